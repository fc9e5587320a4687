"""Tests of what only a GPU runs: Transformer Engine's layers, NCCL, FP8. `pytest -m full tests/gpu` where there is one.

The processes of the commands decide for themselves between GPU and CPU; this one does not touch CUDA.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_align.runtime.local_launch import number_of_gpus
from tests.gpu.commands import FOLDER, GpuInputs, make_inputs

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    if ours and number_of_gpus() == 0:
        for item in ours:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> GpuInputs:
    """Rows, and a policy that a CPU made."""
    folder = os.environ.get(FOLDER)
    return make_inputs(Path(folder).resolve() if folder else tmp_path_factory.mktemp("gpu"))
