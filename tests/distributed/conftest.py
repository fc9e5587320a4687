"""Fixtures of the tests that run whole stages on several processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.stage_runs import run_stage
from tests.stage_inputs import StageInputs, stage_overrides


@pytest.fixture(scope="session")
def policy(pool1, stage_inputs: StageInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a pretrained model that runs start from."""
    run_dir = tmp_path_factory.mktemp("policy")
    run_stage(pool1, "pretrain", run_dir, stage_overrides(stage_inputs, "pretrain"))
    return run_dir
