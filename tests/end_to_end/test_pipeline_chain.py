"""A chain of real stages, from random weights through SFT, a reward model and its scores to DPO, across layouts.

Killed in the middle of a stage, the same command ends with the same numbers as a run that nobody disturbed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece

from nemo_align.training.metrics import read_metrics

WORDS = [
    "the", "cat", "sat", "on", "a", "mat", "and", "it", "ran", "to", "see", "one", "red", "dog", "by", "big", "sun"
]  # fmt: skip
PROJECT = Path(__file__).parents[2]


def sentence(number: int, length: int) -> str:
    return " ".join(WORDS[(number * 7 + k * k) % len(WORDS)] for k in range(length))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A tokenizer trained on a few words, and rows of each kind."""
    folder = tmp_path_factory.mktemp("data")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sentence(number, 12) for number in range(400)]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=[f"<extra_id_{number}>" for number in range(8)] + ["\n"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def turns(number: int) -> list[dict]:
        return [{"role": "user", "content": sentence(number, 4)}]

    answers = [{"messages": [*turns(n), {"role": "assistant", "content": sentence(n, 6)}]} for n in range(48)]
    write("sft.jsonl", answers)
    rated = [{"prompt": sentence(n, 4), "response": sentence(n, 3 + n % 5), "length": float(n % 5)} for n in range(48)]
    write("rated.jsonl", rated)
    pairs = [{"prompt": sentence(n, 4), "chosen": sentence(n, 7), "rejected": sentence(n, 3)} for n in range(48)]
    write("pairs.jsonl", pairs)
    return folder


def command(data: Path, run_dir: Path) -> list[str]:
    sizes = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 384,
    }
    model = ["model=tiny", *(f"model.{key}={value}" for key, value in sizes.items()), "model.max_sequence_length=128"]
    train = ["train.global_batch_size=8", "train.max_steps=6", "optimizer.lr=1e-3", "checkpoint.save_every=2"]
    chat = ["precision=fp32", "data.sequence_length=128"]
    stages = {
        "sft": ("sft", None, [*model, *train, f"data.tokenizer={data}/tokenizer.model", *_rows(data / "sft.jsonl")]),
        "reward": (
            "reward",
            "sft",
            [
                *train,
                *_rows(data / "rated.jsonl"),
                "parallel=tp2",
                "reward.attributes=[length]",
                "reward.weights={length: 1.0}",
            ],
        ),
        "score": ("score", "reward", [f"inputs.pairs={data}/pairs.jsonl"]),
        "dpo": (
            "preference",
            "sft",
            [*train, *_rows("{score}/pairs.jsonl"), "data.select.inverted=swap", "parallel=pp2"],
        ),
    }
    texts = [f"run_dir={run_dir}", f"overrides={_listed(chat)}"]
    for name, (verb, source, overrides) in stages.items():
        texts += [f"stages.{name}.verb={verb}", f"stages.{name}.overrides={_listed(overrides)}"]
        texts += [f"stages.{name}.init_from={source}"] if source else []
    return [sys.executable, "-m", "nemo_align.cli", "pipeline", *texts]


def _rows(path: Path | str) -> list[str]:
    return [f"data.train.a.path={path}", f"data.validation.a.path={path}"]


def _listed(texts: list[str]) -> str:
    return "[" + ",".join(f'"{text}"' for text in texts) + "]"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


def run(argv: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run(command(data, run_dir))
    assert done.returncode == 0, done.stderr[-4000:]
    return run_dir


def test_every_stage_hands_over_across_layouts(undisturbed):
    stages = _stages(undisturbed)
    assert {stage["status"] for stage in stages.values()} == {"complete"}
    assert stages["dpo"]["inputs"] == {"sft": stages["sft"]["identity"], "score": stages["score"]["identity"]}
    assert (stages["reward"]["layout"]["tensor"], stages["dpo"]["layout"]["pipeline"]) == (2, 2)
    first = stages["dpo"]["metrics"]["first"]
    assert first["validation/a/preference_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert (
        stages["sft"]["metrics"]["last"]["validation/a/loss"] < stages["sft"]["metrics"]["first"]["validation/a/loss"]
    )
    assert stages["sft"]["mfu"] > 0 and stages["dpo"]["forward_only"]["reference"]["seconds"] > 0
    assert "<svg" in (undisturbed / "report.html").read_text()


def test_the_same_command_again_trains_nothing(data, undisturbed):
    before = (undisturbed / "dpo" / "metrics.jsonl").stat().st_mtime_ns
    done = run(command(data, undisturbed))
    assert done.returncode == 0 and done.stderr.count(": complete") == 4
    assert (undisturbed / "dpo" / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_in_a_stage_it_goes_on_and_ends_the_same(data, undisturbed, tmp_path, number):
    run_dir = tmp_path / "run"
    with open(tmp_path / "output.txt", "wb") as output:
        pipeline = subprocess.Popen(command(data, run_dir), env=environment(), stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + 600
            while not any(
                record["kind"] == "train" and record["step"] >= 3 for record in read_metrics(run_dir / "reward")
            ):
                assert pipeline.poll() is None, (tmp_path / "output.txt").read_text()[-4000:]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            pipeline.send_signal(number)
            code = pipeline.wait(120)
        finally:
            pipeline.kill()
            pipeline.wait()
    assert code == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    done = run(command(data, run_dir))
    assert done.returncode == 0, done.stderr[-4000:]
    if number == signal.SIGTERM:  # a kill may come before the first save, written beside the steps, is published
        assert "resumed" in (run_dir / "reward" / "log.txt").read_text()
    before, after = (_stages(folder) for folder in (undisturbed, run_dir))
    assert {name: stage["restarts"] for name, stage in after.items()} == {"sft": 0, "reward": 1, "score": 0, "dpo": 0}
    assert {stage["status"] for stage in after.values()} == {"complete"}
    # Deterministic up to threads and reduction order, which are the same in both runs.
    for name, stage in after.items():
        for when in ("first", "last"):
            assert stage["metrics"][when] == pytest.approx(before[name]["metrics"][when], rel=1e-5, abs=1e-7), name
        assert (stage["steps"], stage["tokens"]) == (before[name]["steps"], before[name]["tokens"])
    assert after["reward"]["metrics"]["last"] and after["dpo"]["metrics"]["last"]
    for name in ("sft", "reward", "dpo"):
        expected, found = (_losses(folder / name) for folder in (undisturbed, run_dir))
        assert list(found) == list(expected) == [1, 2, 3, 4, 5, 6]  # each step once
        assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)
    expected, found = (
        [json.loads(line) for line in (folder / "score" / "pairs.jsonl").read_text().splitlines()]
        for folder in (undisturbed, run_dir)
    )
    for key in ("chosen_reward", "rejected_reward"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=1e-5, abs=1e-6)


def _stages(run_dir: Path) -> dict[str, dict]:
    return {stage["name"]: stage for stage in json.loads((run_dir / "manifest.json").read_text())["stages"]}


def _losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(run_dir) if record["kind"] == "train"}
