"""The plan's memory against measured memory: every kind of the quickstart's stages, in its model, layout and batches.

Both ranks of a stage run in fresh processes (`memory_child.py`) whose resident memory is held memory. Measured is how
far a step's peak lies above what is resident beside tensors as the step begins: above interpreter, libraries and data.
The plan's figure is that of its parts that are tensors, so without CUDA context, NCCL and the allocator's
fragmentation, and with the loss in the smaller pieces that it takes on a CPU.

`pytest -s -m '' tests/distributed/test_planned_memory.py` prints what docs/plan.md shows (tools/plan_tables.py).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import plan_tables
import pytest

from nemo_align.config.compose import compose, to_yaml
from nemo_align.config.job_size import job_layout
from nemo_align.config.stages import TrainStageConfig
from nemo_align.data.tokenizer import load_tokenizer
from nemo_align.planning import activations
from nemo_align.planning.estimate import job_of
from nemo_align.planning.lengths import read_lengths
from nemo_align.planning.memory import memory_plan
from nemo_align.planning.workload import segments_of
from tests.distributed.memory_child import MALLOC_SETTINGS
from tests.stage_inputs import StageInputs, make_stage_inputs

ROOT = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).with_name("memory_child.py")
STEPS = 4
# Verb, rows and the names that the quickstart gives their files.
STAGES = {
    "code_sft": ("sft", "dialogues", ["code_sft"]),
    "reward": ("reward", "rated", ["codeio"]),
    "dpo": ("preference", "pairs", ["tasks", "code"]),
    "rpo_3": ("preference", "pairs", ["tasks", "code"]),
}
BLENDS = ("english", "multilingual", "code")
SCORES = ("clarity", "practice", "educational", "safety", "difficulty")
NEAR = 0.12  # measured were 7 % at most


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> StageInputs:
    """Rows that nearly fill the quickstart's 512 tokens, so that micro-batches are full."""
    inputs = make_stage_inputs(tmp_path_factory.mktemp("planned_memory"))
    tokenizer, chance = load_tokenizer(inputs.tokenizer), random.Random(3)

    def text() -> str:
        words = ""
        while len(tokenizer.encode_text(words)) < 235:
            words += chance.choice(("abcd ", "efg hi ", "jklmn ", "op "))
        return words

    rows = {
        "dialogues": lambda: {"messages": [{"role": role, "content": text()} for role in ("user", "assistant")]},
        "rated": lambda: {"prompt": text(), "response": text(), **dict.fromkeys(SCORES, 1.0)},
        "pairs": lambda: {
            "prompt": text(),
            "chosen": text(),
            "rejected": text(),
            "chosen_reward": 2,
            "rejected_reward": 1,
        },
    }
    for name, row in rows.items():
        for suffix, number in (("", 60), ("_held_out", 4)):
            inputs.rows(name + suffix).write_text("".join(json.dumps(row()) + "\n" for _ in range(number)))
    return inputs


@pytest.fixture(scope="module")
def pretrained(inputs: StageInputs, tmp_path_factory: pytest.TempPathFactory) -> TrainStageConfig:
    """The pretraining stage after its run: all others start from its weights."""
    files = [f"data.phases.main.blend.{part}.path={inputs.blend}" for part in BLENDS]
    files += [f"data.validation.{part}.path={inputs.blend}" for part in BLENDS]
    return run("pretrain", "pretrain", inputs, tmp_path_factory.mktemp("pretrain") / "run", files)


def run(name: str, verb: str, inputs: StageInputs, run_dir: Path, overrides: list[str]) -> TrainStageConfig:
    """Both ranks of a stage of the quickstart, for a few steps on other files."""
    given = [f"run_dir={run_dir}", f"data.tokenizer={inputs.tokenizer}", f"train.max_steps={STEPS}"]
    config = compose(verb, [f"+experiment=quickstart/{name}", *given, *overrides])
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(config))
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {**os.environ, **MALLOC_SETTINGS, **{key: str(value) for key, value in place.items()}}
        environment |= {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(CHILD), verb, str(run_dir / "config.yaml"), str(run_dir / f"memory_{rank}.json")]
        with open(run_dir / f"said_{rank}.txt", "w") as said:
            ranks.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said))
    codes = [rank.wait(600) for rank in ranks]
    assert codes == [0, 0], "\n".join((run_dir / f"said_{rank}.txt").read_text() for rank in range(2))
    return config


def peak(run_dir: Path, rank: int) -> int:
    """Bytes of this rank's tensors at the highest moment of a step."""
    records = json.loads((run_dir / f"memory_{rank}.json").read_text())["records"]
    steps = [
        after["VmHWM"] - (begin["VmRSS"] - begin["tensors"])
        for begin, after in itertools.pairwise(records)
        if begin["begins"] == "train"
    ]
    return max(steps[1:])  # in the first the libraries load what they need


def planned(config: TrainStageConfig) -> list[float]:
    """Bytes of tensors on each pipeline stage, for rows of the lengths that the run has found."""
    found = [read_lengths(path.parent, segments_of(config)) for path in Path(config.run_dir).glob("cache/*/meta.json")]
    lengths = max(found, key=len, default=None)  # of training, not of validation
    config.parallel = job_layout(config, started=2)
    with patch.object(activations, "LOSS_CHUNK_TOKENS", plan_tables.CPU_LOSS_CHUNK_TOKENS):
        stages = memory_plan(job_of(config, config.train.global_batch_size, lengths)).stages
    return [stage.tensors for stage in stages]


def check(name: str, config: TrainStageConfig) -> None:
    predicted = planned(config)
    for rank in range(2):
        measured, expected = peak(Path(config.run_dir), rank), predicted[rank % len(predicted)]
        print(f"\n{name} rank {rank}: measured {measured / 1e6:.1f} MB, planned {expected / 1e6:.1f} MB", end="")
        assert measured == pytest.approx(expected, rel=NEAR)
        assert measured / 1e6 == pytest.approx(plan_tables.QUICKSTART_MEASURED[name][rank], rel=NEAR)


def test_pretraining_takes_what_the_plan_says(pretrained: TrainStageConfig) -> None:
    check("pretrain", pretrained)


@pytest.mark.full
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_on_rows_takes_what_the_plan_says(
    name: str, pretrained: TrainStageConfig, inputs: StageInputs, tmp_path: Path
) -> None:
    verb, rows, files = STAGES[name]
    overrides = [f"data.train.{file}.path={inputs.rows(rows)}" for file in files]
    overrides += [f"data.validation.{file}.path={inputs.rows(f'{rows}_held_out')}" for file in files]
    overrides.append(f"checkpoint.init_from={pretrained.run_dir}")
    check(name, run(name, verb, inputs, tmp_path / "run", overrides))


def test_the_plan_takes_the_pieces_of_the_loss_that_the_loss_takes() -> None:
    from nemo_align.objectives.log_probs import _CHUNK_TOKENS

    assert {"cuda": activations.LOSS_CHUNK_TOKENS, "cpu": plan_tables.CPU_LOSS_CHUNK_TOKENS} == _CHUNK_TOKENS
