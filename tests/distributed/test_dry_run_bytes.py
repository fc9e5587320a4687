"""What a dry run says of checkpoints and ranks, held against a run that wrote and held them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.stage_runs import run_stage
from tests.stage_inputs import StageInputs, stage_overrides


@pytest.mark.parametrize(
    "verb, precision, distributed",
    [
        ("sft", "bf16", True),
        pytest.param("sft", "fp32", True, marks=pytest.mark.full),
        pytest.param("sft", "fp32", False, marks=pytest.mark.full),
        pytest.param("reward", "bf16", True, marks=pytest.mark.full),
    ],
)
def test_bytes_of_a_checkpoint(
    verb: str, precision: str, distributed: bool, pool1, stage_inputs: StageInputs, tmp_path: Path
) -> None:
    from nemo_align.config.compose import load_resolved
    from nemo_align.dry_run.checkpoints import bytes_of_checkpoint

    texts = [*stage_overrides(stage_inputs, verb), f"precision={precision}", "train.max_steps=1", "~data.validation"]
    records = run_stage(pool1, verb, tmp_path, texts, {"distributed_optimizer": distributed})
    config = load_resolved(verb, tmp_path / "config.yaml")
    predicted = bytes_of_checkpoint(config, getattr(config, "reward", None))
    [saved] = [record["save/gigabytes"] * 1e9 for record in records if record["kind"] == "save"]
    # Beside the tensors: random states and, for each module, what it might have of its own: some 45 kB.
    assert predicted < saved < predicted + 80_000, (predicted, saved)
