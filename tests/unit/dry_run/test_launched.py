"""A dry run inside a job: rank 0 speaks, in the world of the job."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.dry_run.child import ROOT


@pytest.mark.parametrize("rank", [0, pytest.param(7, id="another")])
def test_rank_0_speaks(rank: int, tmp_path: Path) -> None:
    place = {"RANK": rank, "WORLD_SIZE": 16, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 8, "MASTER_PORT": 1}
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "nowhere"}
    variables |= {name: str(value) for name, value in place.items()}
    command = [sys.executable, "-W", "ignore", "-m", "nemo_align.cli", "sft", "+experiment=nemotron4_15b/code_sft"]
    command += ["dry_run=true", "gpus=null"]
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    if rank == 0:
        assert "16 processes, 2 nodes of 8: tensor 4 x pipeline 1 x data 4" in done.stdout
    else:
        assert done.stdout == ""
