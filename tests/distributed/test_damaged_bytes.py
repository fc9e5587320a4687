"""Bytes of a checkpoint changed at their length, and read without the manifest's checksums: loaded, or refused."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import checkpoint_runs as runs
from tests.distributed.pool import WorkerPool, with_topology

ONE = {"distributed_optimizer": True}


@pytest.fixture(scope="module")
def saved(pool1: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged_bytes")
    tokenizer = runs.train_tokenizer(folder / "tokenizer")
    [path] = pool1.run(with_topology, runs.train_and_save, ONE, str(folder / "run"), tokenizer, 1, final=False)
    return Path(path)


def load_each(topology, folders: list[str]) -> list[str]:
    """What comes of a resume from each folder: "loaded", or the error."""
    from nemo_align.checkpoint import megatron
    from nemo_align.config.errors import raised_by_this_package

    said = []
    for folder in folders:
        run = runs.build(topology)
        try:
            megatron.load_training(Path(folder), run.chunks, run.optimizer, run.scheduler, topology, verify=False)
        except ValueError as error:
            said.append(str(error) if raised_by_this_package(error) else f"a library's: {error!r}")
        except BaseException as error:
            said.append(f"not ours: {error!r}")
        else:
            said.append("loaded")
    return said


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_changed_bytes_are_refused_or_read(name: str, saved: Path, pool1: WorkerPool, tmp_path: Path) -> None:
    """A tensor's own numbers may be any; the rest is refused in words that name the checkpoint."""
    chance = np.random.default_rng(0)
    folders = []
    for number in range(25):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        content = bytearray((folder / name).read_bytes())
        for place in chance.integers(0, len(content), 1 if number % 2 else 30):
            content[place] ^= int(chance.integers(1, 256))
        if number == 0:
            content = bytes(len(content))
        (folder / name).write_bytes(content)
        folders.append(str(folder))
    [said] = pool1.run(with_topology, load_each, ONE, folders)
    for folder, text in zip(folders, said, strict=True):
        assert text == "loaded" or (folder in text and "\n" not in text), text
    print(Counter(text == "loaded" for text in said))
    assert "is refused" in said[0] and sum("refused" in text for text in said) >= 5
