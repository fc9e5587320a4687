"""Steps of a stage: pretraining's samples, and rows with their real lengths."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from nemo_align.cli import main
from nemo_align.config.compose import compose
from nemo_align.data.step_plan import plan_step
from nemo_align.planning.lengths import fitted, read_lengths
from nemo_align.planning.plan import plan_layout
from nemo_align.planning.step_time import step_time
from nemo_align.planning.workload import stage_length, step_work
from tests.unit.planning.stages import planned

SFT = ["verb=sft", "model=nemotron4_15b", "parallel=tp8", "train.global_batch_size=64", "train.epochs=2"]
DPO = ["verb=preference", "model=nemotron4_15b", "parallel=tp8", "train.global_batch_size=64", "train.epochs=1"]


@pytest.fixture
def lengths(tmp_path):
    path = tmp_path / "lengths.npy"
    np.save(path, np.random.default_rng(1).integers(100, 2000, size=1000))
    return path


def test_pretraining_has_samples_of_one_length():
    config = planned(["parallel=tp8_pp12", "gpus=1536", "data.phases.main.steps=10"])
    work = step_work(config.stage, 768, None)
    assert (work.micro_batches, work.tokens, work.squared_tokens) == (48, 4096, 4096**2)
    assert (work.real_tokens, work.real_squared_tokens) == (768 * 4096, 768 * 4096**2)
    assert [(b.size, b.steps) for b in stage_length(config).batches] == [(768, 10)]


def test_a_ramp_is_planned_size_by_size():
    ramp = "[{from_tokens:0,global_batch_size:768},{from_tokens:200e9,global_batch_size:1536}]"
    arguments = ["parallel=tp8_pp12", "gpus=1536", "data.phases.main.steps=100000", f"train.batch_ramp={ramp}"]
    config = compose("plan", ["model=nemotron4_340b", "train.global_batch_size=1536", *arguments])
    result = plan_layout(config)
    assert [(b.size, b.steps) for b in result.length.batches] == [(768, 63579), (1536, 100000 - 63579)]
    assert result.total is not None
    assert result.total.tokens == pytest.approx(4096 * (63579 * 768 + 36421 * 1536))
    seconds = sum(b.steps * e.time.total for b, e in zip(result.length.batches, result.estimates, strict=True))
    assert result.total.seconds == pytest.approx(seconds)


def test_rows_without_lengths_are_taken_as_full():
    config = compose("plan", SFT)
    length = stage_length(config)
    assert length.assumption is not None and length.batches[0].steps is None
    work = step_work(config.stage, 64, length.lengths)
    assert (work.micro_batches, work.tokens, work.real_tokens) == (64, 4096, 64 * 4096)


def test_rows_without_lengths_may_have_a_number():
    config = compose("plan", [*SFT, "dry_run_rows=1000"])
    assert stage_length(config).batches[0].steps == -(-2000 // 64)
    recipe = compose("plan", ["+experiment=nemotron4_340b/dpo"])
    assert stage_length(recipe).batches[0].steps == 625  # 160,000 pairs in batches of 256
    total = plan_layout(recipe).total
    assert total is not None and 0 < total.reference_seconds < total.train_seconds


def test_rows_are_packed_as_training_packs_them(lengths):
    config = compose("plan", [*SFT, f"lengths={lengths}", "parallel.data=2"])
    length = stage_length(config)
    rows = np.load(lengths)[:, None]
    assert length.batches[0].steps == -(-2000 // 64)
    work = step_work(config.stage, 64, length.lengths)
    order = np.random.default_rng(0).permutation(1000)
    first = plan_step(order[:64], rows, np.ones(1000), capacity=4096, data_parallel=2, fixed_length=True)
    assert work.tokens == 4096 and abs(work.micro_batches - first.num_micro_batches) <= 1
    assert work.real_tokens == pytest.approx(64 * rows.mean(), rel=0.05)
    assert work.squared_tokens < 4096**2  # segments do not attend to each other


def test_real_lengths_make_a_stage_shorter_than_full_rows(lengths):
    full = plan_layout(compose("plan", [*SFT, "train.epochs=null", "train.max_steps=32"]))
    real = plan_layout(compose("plan", [*SFT, f"lengths={lengths}"]))
    assert full.total is not None and real.total is not None
    assert real.total.steps == 32
    assert real.total.seconds < 0.5 * full.total.seconds
    assert real.main.mfu < full.main.mfu  # padding is not counted


def test_pairs_have_two_lengths_and_a_reference_pass(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("\n".join(f"{100 + i} {90 + i}" for i in range(256)))
    result = plan_layout(compose("plan", [*DPO, f"lengths={path}"]))
    assert result.total is not None and result.total.steps == 4
    assert 0 < result.total.reference_seconds < result.total.train_seconds
    assert result.main.memory.reference_pass is not None
    assert result.main.memory.reference_pass < result.main.memory.largest.total


def test_a_cache_of_tokenized_rows_is_read(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps({"segments": 2}))
    np.save(tmp_path / "offsets.npy", np.array([0, 3, 5, 10, 16]))
    assert read_lengths(tmp_path, 2).tolist() == [[3, 2], [5, 6]]


@pytest.mark.parametrize(
    "content, said",
    [("1 2\n3\n", "lines of different kinds"), ("a\n", "whole numbers"), ("", "empty"), ("1 2\n", "two|2 numbers"),
     ("0\n5\n", "lengths=.*1 of 2 rows with less than 1 token")],
)  # fmt: skip
def test_wrong_files_are_refused(tmp_path, content, said):
    path = tmp_path / "lengths.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        read_lengths(path, 1)


@pytest.mark.parametrize(
    "content, said",
    [(None, "does not exist"), (b"", "no plain numbers"), (b"1\n2\n", "no plain numbers"), ([], "int64"),
     ([1.5], "float64"), ([3, -4], "1 of 2 rows with less than 1 token")],
)  # fmt: skip
def test_wrong_arrays_are_refused_by_the_name_of_the_key(tmp_path, content, said):
    path = tmp_path / "lengths.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, np.array(content, dtype=None if content else np.int64))
    with pytest.raises(ValueError, match=f"lengths={path}.*{said}"):
        read_lengths(path, 1)


def test_a_search_says_what_becomes_of_long_rows_too(tmp_path, capsys):
    path = tmp_path / "lengths.npy"
    np.save(path, np.array([900, 1200] * 64))
    arguments = ["data.sequence_length=1000", "gpus=16", "top=1", f"lengths={path}", f"json={tmp_path / 'plan.json'}"]
    assert main(["plan", *SFT, *arguments, "search=true"]) == 0
    said = "64 of 128 rows are longer than data.sequence_length=1000"
    assert f"note: {said}" in capsys.readouterr().out
    assert said in json.loads((tmp_path / "plan.json").read_text())["overlong"]


def test_overlong_rows_are_what_the_stage_makes_of_them():
    data = compose("plan", [*SFT, "data.sequence_length=1000"]).stage.data
    rows = np.array([[900], [1200]])
    assert fitted(rows[:1], data) == (rows[:1], None)
    kept, note = fitted(rows, data)
    assert kept.tolist() == [[900], [1000]]  # sft truncates
    assert note is not None and "1 of 2 rows are longer than data.sequence_length=1000" in note
    assert "the longest has 1,200 tokens" in note and "taken as cut" in note
    data.overlong = "drop"
    kept, note = fitted(rows, data)
    assert kept.tolist() == [[900]]
    assert note is not None and "left out, as in training" in note
    data.overlong = "error"
    with pytest.raises(ValueError, match=r"1 of 2 rows are longer than data\.sequence_length=1000"):
        fitted(rows, data)


def test_too_long_rows_and_missing_files_are_named(tmp_path, capsys):
    path = tmp_path / "lengths.npy"
    with pytest.raises(ValueError, match=r"lengths=.*lengths\.npy does not exist: name a \.npy of whole numbers"):
        plan_layout(compose("plan", [*SFT, f"lengths={path}"]))
    np.save(path, np.array([100, 5000, 6000, 300]))
    assert main(["plan", *SFT, f"lengths={path}"]) == 0
    assert "note: 2 of 4 rows are longer than data.sequence_length=4096 (the longest" in capsys.readouterr().out


def test_layouts_that_share_their_micro_batches_share_the_work():
    """What a search computes once is what each layout computes for itself."""
    lengths = np.random.default_rng(2).integers(100, 3000, size=(5_000, 1))
    stages = [compose("plan", [*SFT, f"parallel.recompute={how}"]).stage for how in ("none", "full", "selective")]
    shared = [step_work(stage, 64, lengths) for stage in stages]
    assert shared[0] is shared[1] is shared[2]
    assert step_work(stages[0], 64, lengths.copy()) == shared[0]  # computed anew
    assert step_work(stages[0], 128, lengths) != shared[0]


def test_steps_of_an_interleaved_schedule_have_whole_rounds_each(tmp_path):
    """Some steps take one round of twelve micro-batches and some two: their mean is no number that a schedule takes."""
    path = tmp_path / "lengths.npy"
    np.save(path, np.random.default_rng(1).integers(100, 1400, size=20_000))
    config = compose("plan", ["+experiment=nemotron4_340b/code_sft", f"lengths={path}"])
    (estimate,) = plan_layout(config).estimates
    work = estimate.job.work
    counts = work.micro_batch_counts()
    assert set(counts) == {12, 24} and 12 < work.micro_batches < 24
    assert work.micro_batches == pytest.approx(sum(count * steps for count, steps in counts.items()) / counts.total())

    def pipeline_seconds(count):
        return step_time(replace(estimate.job, work=replace(work, micro_batches=count, counts=()))).pipeline

    mean = sum(pipeline_seconds(count) * steps for count, steps in counts.items()) / counts.total()
    assert estimate.time.pipeline == pytest.approx(mean)
