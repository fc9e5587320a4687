"""A rank's file: its checksum is taken while it is written, and a disk that fails is named."""

from __future__ import annotations

import errno
from collections import deque
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.planner import SavePlan

from nemo_align.runtime import device

device.install()  # before Megatron-core is imported

from nemo_align.checkpoint.manifest import describe_files  # noqa: E402
from nemo_align.checkpoint.snapshot import Cancelled, Snapshot, _CheckedFile, _write_item, write_checked  # noqa: E402


def test_the_checksum_is_that_of_the_file(tmp_path: Path) -> None:
    with _CheckedFile(tmp_path / "data") as file:
        for size in (3, 100_000):
            _write_item(torch.arange(size), file)
    whole = describe_files(tmp_path, ["data"])["data"]
    assert file.entry() == {"bytes": whole["bytes"], "blake3": [[whole["bytes"], whole["blake3"]]]}
    assert write_checked(tmp_path / "other", b"weights") == describe_files(tmp_path, ["other"])["other"]


def test_a_view_leaves_its_storage_behind(tmp_path: Path) -> None:
    with _CheckedFile(tmp_path / "data") as file:
        _write_item(torch.zeros(1_000_000)[:5], file)
    assert file.num_bytes < 5_000
    assert torch.equal(torch.load(tmp_path / "data", weights_only=True), torch.zeros(5))


@pytest.mark.parametrize("size", [10, 1_000_000])  # fails when flushed at the end, and in the middle of a tensor
def test_a_full_disk_is_named(size: int) -> None:
    with pytest.raises(OSError) as caught, _CheckedFile(Path("/dev/full")) as file:
        _write_item(torch.zeros(size), file)
    assert caught.value.errno == errno.ENOSPC
    assert str(caught.value) == "[Errno 28] No space left on device: '/dev/full'"


def test_a_cancelled_part_ends_without_an_entry(tmp_path: Path) -> None:
    snapshot = Snapshot(0, SavePlan([]), deque([(None, torch.zeros(2))]), None, 8)
    snapshot.cancelled.set()
    with pytest.raises(Cancelled):
        snapshot.write(tmp_path)
