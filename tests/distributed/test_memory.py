"""Memory: it does not grow with steps in any stage, preference training holds one model, a save one copy of its shards.

Each run is a fresh process (`memory_child.py`) whose allocator gives every block of 64 KiB back when it is freed, so
that resident memory is held memory; peaks are the kernel's own. All rows have the same length, so that every step needs
the same memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_align.config.compose import compose, to_yaml
from tests.distributed.memory_child import MALLOC_SETTINGS
from tests.stage_inputs import MODEL, StageInputs, make_stage_inputs, stage_overrides

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 1e6
STEPS = 12  # n; a run has 3 n
# What may come and go in the heap between two like moments: Python's arenas (256 KiB to 1 MiB) and blocks below 64 KiB
# beside one another. A batch's activations that stayed would be 24 times 0.5 MB or more, a gradient 24 times 0.5 MB.
SLACK = 1.5 * MEGABYTE
TEXT = "abc def ghi " * 2
# 26 M parameters: what a model costs in training (16 bytes each in fp32) is far above what anything else does.
LARGE = [
    "model.hidden_size=768",
    "model.ffn_hidden_size=3072",
    "model.num_attention_heads=12",
    "model.num_query_groups=4",
    "model.head_dim=64",
]
READ_BUFFER = 8 << 20  # with which files are read for their checksums


@dataclass
class Run:
    """Memory of a run. Records begin where a step, a save or the end begins, and tell of the stretch before."""

    run_dir: Path
    before: dict[str, int]  # after the imports
    records: list[dict]

    def at(self, kind: str) -> list[dict]:
        """Records at which a stretch of this kind begins."""
        return [record for record in self.records if record["begins"] == kind]

    def peak_until_first_save(self) -> int:
        """Bytes from the start of the run to its first save, above what is resident beside tensors as training begins:
        the interpreter, libraries, data (what was resident after the imports varies by 70 MB between like runs)."""
        first = next(index for index, record in enumerate(self.records) if record["begins"] == "save")
        begin = self.at("train")[0]
        return max(record["VmHWM"] for record in self.records[: first + 1]) - (begin["VmRSS"] - begin["tensors"])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> StageInputs:
    """The usual inputs, with one row again and again."""
    inputs = make_stage_inputs(tmp_path_factory.mktemp("memory"))
    turns = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]
    pair = {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT[::-1], "chosen_reward": 2.0, "rejected_reward": 1.0}
    rows = {
        "dialogues": {"messages": turns},
        "rated": {"prompt": TEXT, "response": TEXT, "clarity": 1.0, "safety": 2.0},
        "pairs": pair,
    }
    for name, row in rows.items():
        inputs.rows(name).write_text((json.dumps(row) + "\n") * 40)
        inputs.rows(f"{name}_held_out").write_text((json.dumps(row) + "\n") * 4)
    many = [json.dumps({"messages": [{"role": "user", "content": f"{n:04}"}, turns[1]]}) for n in range(24 * STEPS)]
    inputs.rows("to_score").write_text("\n".join(many) + "\n")
    return inputs


def measured(verb: str, run_dir: Path, overrides: list[str]) -> Run:
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(compose(verb, [*overrides, f"run_dir={run_dir}"])))
    child = Path(__file__).with_name("memory_child.py")
    report = run_dir / "memory.json"
    environment = {**os.environ, **MALLOC_SETTINGS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(child), verb, str(run_dir / "config.yaml"), str(report)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    return Run(run_dir, found["before"], found["records"])


def training(inputs: StageInputs, verb: str, *extra: str) -> list[str]:
    starts = any(text.startswith("checkpoint.init_from") for text in extra)  # then the checkpoint says the sizes
    model = [text for text in MODEL if text.startswith("precision")] if starts else MODEL
    return [*model, *stage_overrides(inputs, verb), *extra]


def check_growth(run: Run, kind: str) -> None:
    """What is held, and the peak of a step, after n steps and after 3 n."""
    steps = run.at(kind)
    assert len(steps) >= 3 * STEPS, len(steps)
    early, late = steps[STEPS], steps[3 * STEPS - 1]
    assert late["tensors"] == early["tensors"], "a tensor of each step stays"
    grown = late["RssAnon"] - early["RssAnon"]
    peaks = [max(step["VmHWM"] for step in steps[end - 6 : end]) for end in (STEPS + 1, 3 * STEPS)]
    print(f"{run.run_dir.name}: held {grown / MEGABYTE:+.2f} MB, peak {(peaks[1] - peaks[0]) / MEGABYTE:+.2f} MB")
    assert grown < SLACK
    assert peaks[1] - peaks[0] < SLACK


@pytest.mark.full
def test_memory_of_pretraining(inputs: StageInputs, tmp_path: Path) -> None:
    run = measured("pretrain", tmp_path / "run", training(inputs, "pretrain", f"data.phases.first.steps={3 * STEPS}"))
    check_growth(run, "train")


@pytest.mark.full
def test_memory_of_sft_and_preference_training(inputs: StageInputs, tmp_path: Path) -> None:
    length = f"train.max_steps={3 * STEPS}"
    policy = measured("sft", tmp_path / "sft", training(inputs, "sft", length))
    check_growth(policy, "train")
    start = f"checkpoint.init_from={policy.run_dir}"
    check_growth(measured("preference", tmp_path / "dpo", training(inputs, "preference", length, start)), "train")


@pytest.mark.full
def test_memory_of_reward_training_and_of_scoring(inputs: StageInputs, tmp_path: Path) -> None:
    run = measured("reward", tmp_path / "reward", training(inputs, "reward", f"train.max_steps={3 * STEPS}"))
    check_growth(run, "train")
    overrides = ["precision=fp32", f"checkpoint.init_from={run.run_dir}", "data.sequence_length=96"]
    scored = measured("score", tmp_path / "score", [*overrides, f"inputs.rows={inputs.rows('to_score')}"])
    check_growth(scored, "forward")


@pytest.mark.full
def test_preference_training_holds_one_model(inputs: StageInputs, tmp_path: Path) -> None:
    """Its peak, the pass with the reference model included, is within 10 % of SFT's at the same micro-batch tokens.

    A second model would be 4 of 16 bytes per parameter, a quarter more."""
    same = ["train.micro_batch_tokens=192", "train.max_steps=2", "train.global_batch_size=4"]
    peaks, parameters = {}, {}
    for verb, model in (("sft", LARGE), ("preference", [f"checkpoint.init_from={tmp_path / 'sft'}"])):
        run = measured(verb, tmp_path / verb, training(inputs, verb, *model, *same))
        peaks[verb] = run.peak_until_first_save()
        parameters[verb] = run.at("train")[0]["tensors"]
    print({verb: f"{peak / MEGABYTE:.0f} MB" for verb, peak in peaks.items()}, peaks["preference"] / peaks["sft"])
    assert peaks["sft"] > 300 * MEGABYTE  # the parameters dominate
    assert abs(peaks["preference"] / peaks["sft"] - 1) < 0.10
    assert parameters["preference"] < 1.01 * parameters["sft"]


@pytest.mark.full
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_holds_at_most_one_copy_of_its_shards(asynchronous: bool, inputs: StageInputs, tmp_path: Path) -> None:
    """A save beside the steps copies this rank's shards once; a periodic one that is waited for copies none.

    The save at a stage's end loads under any layout, and Megatron-core puts the optimizer's state together for it: fp32
    weights and both moments out of the buffers, then whole, then cut by parameter. That is 9 values per parameter where
    the shards hold 4 (in fp32: the weights, and the optimizer's weights and moments), so 2.25 copies without data
    parallelism.
    Beyond that: the largest tensor on its way into the file, and the buffer with which files are read."""
    choice = f"checkpoint.asynchronous={str(asynchronous).lower()}"
    same = [*LARGE, "train.max_steps=5", "train.global_batch_size=4", "checkpoint.save_every=2", choice]
    run = measured("sft", tmp_path / "sft", training(inputs, "sft", *same))
    shards = sum(path.stat().st_size for path in (run.run_dir / "checkpoints" / "step_0000004").glob("*.distcp"))
    assert shards > 250 * MEGABYTE
    largest = 4 * 768 * 3072
    allowed = {"periodic": shards if asynchronous else 0, "final": 2.25 * shards}
    kinds = [record["begins"] for record in run.records]
    saves = [index for index, kind in enumerate(kinds) if kind == "save"]
    assert len(saves) == 3  # after steps 2 and 4, and at the end
    training_peak = max(record["VmHWM"] for record in run.records[: saves[0] + 1])
    for index in saves:
        final = index == saves[-1]
        end = len(kinds) if final else saves[saves.index(index) + 1]
        held = run.records[index]["VmRSS"]
        during = run.records[index + 1]["VmHWM"] - held
        most = allowed["final" if final else "periodic"] + 2 * largest + READ_BUFFER + 10 * MEGABYTE
        # Beside the steps the copy adds to the peak of a step, while it is being written.
        beside = max(record["VmHWM"] for record in run.records[index + 1 : end]) - training_peak
        print(f"asynchronous={asynchronous}, final={final}: shards {shards / MEGABYTE:.0f} MB, during the save "
              f"{during / MEGABYTE:+.0f} MB, above the training's peak {beside / MEGABYTE:+.0f} MB")  # fmt: skip
        assert during < most and beside < most
