"""Starting the real command with and without a GPU, on the same inputs.

    NEMO_ALIGN_GPU_INPUTS=FOLDER python -m tests.gpu.commands

makes the inputs and all that a CPU computes beforehand, where time on a GPU is short: the tests then take them
from FOLDER.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nemo_align.training.metrics import read_metrics
from tests.stage_inputs import OPTIMIZER, StageInputs, make_stage_inputs, stage_overrides

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "NEMO_ALIGN_GPU_INPUTS"
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
# All sides are multiples of 128, so that every FP8 recipe takes them.
MODEL = [
    "model=tiny",
    "precision=bf16",
    "model.vocab_size=601",
    "model.make_vocab_size_divisible_by=128",
]


# What a GPU must compute as a CPU does: verb and overrides.
CASES = {
    "sft": ("sft", ["train.micro_batch_tokens=384"]),  # several dialogues in a micro-batch
    "sft_unpacked": ("sft", ["train.packing=false"]),
    "reward": ("reward", []),
    "dpo": ("preference", ["preference.preference_loss=dpo"]),
    "rpo": ("preference", ["preference.preference_loss=rpo_bwd_kl", "preference.sft_loss_weight=1e-5"]),
}


@dataclass(frozen=True)
class GpuInputs:
    """Rows, and the run directory of an SFT that a CPU did: the devices' generators give other initial weights."""

    stage: StageInputs
    policy: Path

    def overrides(self, verb: str) -> list[str]:
        """Of a stage that starts from the policy (pretraining starts anew)."""
        start = [] if verb == "pretrain" else [f"checkpoint.init_from={self.policy}"]
        model = MODEL if verb == "pretrain" else ["precision=bf16"]
        return [*model, *stage_overrides(self.stage, verb), *start]

    def on_cpu(self, case: str) -> list[dict]:
        """Records of the training steps of a case without a GPU."""
        verb, extra = CASES[case]
        run_dir = self.stage.folder / "cpu" / case
        if not (run_dir / "result.json").exists():
            command(verb, run_dir, [*self.overrides(verb), *extra], NO_GPU)
        return steps_of(run_dir)


def make_inputs(folder: Path) -> GpuInputs:
    """Inputs in `folder`, or those that are there."""
    inputs = GpuInputs(StageInputs(folder), folder / "policy")
    if not (inputs.policy / "result.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_stage_inputs(folder)
        command("sft", inputs.policy, [*MODEL, *stage_overrides(inputs.stage, "sft"), *OPTIMIZER], NO_GPU)
    return inputs


def steps_of(run_dir: Path) -> list[dict]:
    """Records of training steps."""
    return [record for record in read_metrics(run_dir) if record["kind"] == "train"]


def command(verb: str, run_dir: Path, overrides: list[str], environment: dict[str, str] | None = None) -> list[dict]:
    """Run `nemo-align verb` to its end in `run_dir`; its records of training steps."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "nemo_align.cli", verb, *overrides, f"run_dir={run_dir}", "runtime.threads=2"],
        cwd=ROOT, env=variables | (environment or {}), capture_output=True, text=True, errors="replace",
        timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return steps_of(run_dir)


if __name__ == "__main__":
    made = make_inputs(Path(os.environ[FOLDER]).resolve())
    for name in CASES:
        print(name, [record["loss"] for record in made.on_cpu(name)])
