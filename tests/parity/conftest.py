"""Fixtures of the comparisons with independent implementations."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.start_model import write_policy
from tests.stage_inputs import StageInputs


@pytest.fixture(scope="session")
def start_policy(stage_inputs: StageInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: the weights that both sides start from."""
    return write_policy(tmp_path_factory.mktemp("parity") / "policy", stage_inputs.tokenizer)
