"""Fixtures of the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.checkpoint_runs import train_tokenizer
from tests.nemo_files import Nemo, write_nemo


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SentencePiece model of 400 tokens."""
    return (Path(train_tokenizer(tmp_path_factory.mktemp("nemo_tokenizer"))) / "tokenizer.model").read_bytes()


@pytest.fixture
def nemo(tokenizer: bytes, tmp_path: Path) -> Nemo:
    """A base model, unpacked, in zarr."""
    return write_nemo(tmp_path / "nemo", tokenizer)


@pytest.fixture
def reward(tokenizer: bytes, tmp_path: Path) -> Nemo:
    """A reward model, unpacked, in zarr."""
    return write_nemo(tmp_path / "nemo", tokenizer, variant="reward")
