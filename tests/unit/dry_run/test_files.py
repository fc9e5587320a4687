"""A dry run beside the real files: rows and tokens counted, a step planned from a sample, the run directory read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from nemo_align.config.compose import compose
from nemo_align.config.data import RowsConfig
from nemo_align.data.sampler import EpochSampler
from nemo_align.data.sft import tokenize_sft
from nemo_align.data.step_plan import plan_step
from nemo_align.data.tokenizer import load_tokenizer
from nemo_align.dry_run import rows
from nemo_align.dry_run.rows import RowCount, count_rows, taken
from tests.stage_inputs import MODEL, StageInputs, stage_overrides
from tests.unit.dry_run.child import Answer, Child


@pytest.fixture(scope="module")
def answers(child: Child, tmp_path_factory: pytest.TempPathFactory, stage_inputs: StageInputs) -> dict[str, Answer]:
    folder = tmp_path_factory.mktemp("with_data")
    layout = ["parallel=pp2_vp2", "parallel.data=2", "checkpoint.save_every=1", "dry_run_strict=true"]
    commands = {
        verb: [verb, *MODEL, *stage_overrides(stage_inputs, verb), *layout, "dry_run=true"]
        for verb in ("pretrain", "sft", "reward")
    }
    epochs = ["~train.max_steps", "train.epochs=2"]
    commands["epochs"] = [*commands["sft"], *epochs]
    commands["fp8"] = [*commands["sft"], "precision=fp8_blockwise", "model.hidden_size=64", "model.ffn_hidden_size=64"]
    commands["selection"] = [
        "preference",
        *MODEL,
        *stage_overrides(stage_inputs, "preference"),
        "checkpoint.init_from=not_here",
        "data.select.min_chosen_reward=100",
        "dry_run=true",
    ]
    return dict(zip(commands, child.run(list(commands.values()), folder), strict=True))


def test_pretraining_files_are_counted(answers: dict[str, Answer], stage_inputs: StageInputs) -> None:
    from nemo_align.data.indexed import check_indexed_dataset

    text = answers["pretrain"].out
    tokens = check_indexed_dataset(stage_inputs.blend).num_tokens
    # 2 steps of 8 samples of 48 tokens, then one.
    assert f"text 100%: 768 of {tokens:,}, {768 / tokens:.2g} passes" in text
    assert f"text 100%: 384 of {tokens:,}, {384 / tokens:.2g} passes" in text
    assert f"held out: text: {tokens:,} tokens" in text
    assert "3 steps of 8 samples, 2 micro-batches of 2 on each of 2 replicas" in text


def test_rows_are_counted_and_a_step_is_planned(
    answers: dict[str, Answer], stage_inputs: StageInputs, tmp_path: Path
) -> None:
    text = answers["sft"].out
    assert "rows: 33 rows" in text and "held out: rows: 7 rows" in text
    assert "the first 33 rows give 33 dialogues" in text
    assert "3 steps of 10 dialogues: 30 in all" in text
    # Fewer rows than the sample takes, so this is the first step of the run itself.
    config = compose("sft", [*MODEL, *stage_overrides(stage_inputs, "sft")])
    tokenizer = load_tokenizer(stage_inputs.tokenizer)
    tokenized = tokenize_sft(config.data, config.data.train, tokenizer, cache_dir=tmp_path, seed=config.runtime.seed)
    batch = EpochSampler(33, config.runtime.seed).batch(0, 10)
    layout = {"capacity": 96, "data_parallel": 2, "multiple_of": 2, "fixed_length": True}
    plan = plan_step(batch, tokenized.lengths, tokenized.loss_tokens, **layout)
    empty = sum(not members for rank in plan.micro_batches for members in rank)
    assert f"{plan.num_micro_batches} micro-batches of 96 tokens on each of 2 replicas" in text
    real = plan.real_tokens / (96 * 2 * plan.num_micro_batches)
    assert f"{empty} of {2 * plan.num_micro_batches} empty, {real:.0%} of the tokens real" in text
    assert "not on this machine" not in text
    assert "7 steps of 10 dialogues: 66 in all, 2 epochs" in answers["epochs"].out
    assert "the first 33 rows give" in answers["reward"].out


def test_fp8_is_checked_without_a_gpu(answers: dict[str, Answer]) -> None:
    answer = answers["fp8"]
    assert answer.code == 0, answer.err
    assert "matrix products in FP8 (blockwise): checked as configuration only" in answer.out
    assert "micro-batches of 128 tokens" in answer.out  # 96, padded to what the recipe wants


def test_a_selection_that_leaves_nothing_is_a_warning(answers: dict[str, Answer]) -> None:
    # The first rows need not be like the others, so the run is not refused.
    text = answers["selection"].out
    assert answers["selection"].code == 0, answers["selection"].err
    assert "warnings\n  of the first rows none is left to train on" in text
    assert "3 steps of 10 pairs" in text and "reference log-probabilities" in text


def test_a_begun_run_resumes(child: Child, tmp_path: Path, stage_inputs: StageInputs) -> None:
    from nemo_align.config.compose import to_yaml
    from nemo_align.config.run_directory import claim
    from tests.unit.checkpoint.published import publish

    sft = [*MODEL, *stage_overrides(stage_inputs, "sft"), "run_dir=mine"]
    claim("sft", tmp_path / "mine", to_yaml(compose("sft", sft)))
    [answer] = child.run([["sft", *sft, "dry_run=true"]], tmp_path)
    assert "run directory mine: resumes from the start" in answer.out
    layout = {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1}
    publish(tmp_path / "mine", 2, layout=layout, optimizer_sharding="dp_reshardable")
    again, other = child.run([["sft", *sft, "dry_run=true"], ["sft", *sft, "dry_run=true", "parallel=tp2"]], tmp_path)
    assert "run directory mine: resumes from step_0000002" in again.out
    assert other.code == 2 and "is a periodic save under parallel.tensor=1" in other.err


def test_rows_of_every_kind_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"prompt": "a", "response": str(number)} for number in range(9)]
    lines = "\n".join(map(json.dumps, records)) + "\n"
    (tmp_path / "rows.jsonl").write_text(lines + "\n")
    (tmp_path / "rows.json").write_text(json.dumps(records))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(lines)
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet"):
        assert count_rows(tmp_path / name) == RowCount(9, exact=True), name
    monkeypatch.setattr(rows, "_COUNTED_BYTES", 40)
    large = count_rows(tmp_path / "rows.jsonl")
    assert not large.exact and 7 <= large.rows <= 11 and str(large).startswith("about ")
    assert taken(RowCount(9, True), RowsConfig(path="", fraction=0.5)).rows == 4
    assert taken(RowCount(9, True), RowsConfig(path="", max_rows=20)).rows == 9
