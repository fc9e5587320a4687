"""Starting the real command with and without a GPU, on the same inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nemo_align.training.metrics import read_metrics
from tests.stage_inputs import OPTIMIZER, StageInputs, make_stage_inputs, stage_overrides

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
# All sides are multiples of 128, so that every FP8 recipe takes them.
MODEL = [
    "model=tiny",
    "precision=bf16",
    "model.hidden_size=256",
    "model.head_dim=64",
    "model.ffn_hidden_size=512",
    "model.vocab_size=601",
    "model.make_vocab_size_divisible_by=128",
]


@dataclass(frozen=True)
class GpuInputs:
    """Rows and checkpoints."""

    stage: StageInputs
    policy: Path  # run directory of an SFT
    reward: Path  # of a reward model

    def overrides(self, verb: str) -> list[str]:
        """Of a stage that starts from the policy."""
        start = [] if verb == "pretrain" else [f"checkpoint.init_from={self.policy}"]
        model = MODEL if verb == "pretrain" else ["precision=bf16"]
        return [*model, *stage_overrides(self.stage, verb), *start]


def make_inputs(folder: Path) -> GpuInputs:
    """Initial weights differ between the devices (each has a generator of its own), so a CPU makes them for both."""
    stage = make_stage_inputs(folder)
    inputs = GpuInputs(stage, folder / "policy", folder / "reward")
    command("sft", inputs.policy, [*MODEL, *stage_overrides(stage, "sft"), *OPTIMIZER], NO_GPU)
    return inputs


def command(verb: str, run_dir: Path, overrides: list[str], environment: dict[str, str] | None = None) -> list[dict]:
    """Run `nemo-align verb` to its end in `run_dir`; its records of training steps."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "nemo_align.cli", verb, *overrides, f"run_dir={run_dir}", "train.log_every=1"],
        cwd=ROOT, env=variables | (environment or {}), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return [record for record in read_metrics(run_dir) if record["kind"] == "train"]
