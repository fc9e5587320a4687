"""What a checkpoint holds besides tensors, as the byte entry that megatron-core 0.19 writes: read, or refused by name;
and what else may go wrong while a checkpoint is loaded keeps its own name."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from nemo_align.runtime import device

device.install()  # before Megatron-core is imported

from nemo_align.checkpoint import torch_dist  # noqa: E402
from nemo_align.checkpoint.torch_dist import load_sharded, read_common  # noqa: E402

KEY = "common_state/shard_0_1"
BEFORE = b"tensors of the same file"


def write(folder: Path, value: Any, **place: Any) -> Path:
    """A file whose entry for the common state holds `value`; `place` changes where the metadata look for it."""
    content = io.BytesIO()
    torch.save(value, content)
    file = folder / "__0_0.distcp"
    file.write_bytes(BEFORE + content.getvalue())
    where = {"relative_path": file.name, "offset": len(BEFORE), "length": len(content.getvalue())} | place
    metadata = Metadata({KEY: BytesStorageMetadata()}, storage_data={MetadataIndex(KEY): _StorageInfo(**where)})
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return file


def test_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, [{"scheduler": {"lr": 0.5}}])
    assert read_common(tmp_path) == {"scheduler": {"lr": 0.5}}


@pytest.mark.parametrize("damage", ["cut off", "zeros", "flipped", "gone", "a folder"])
def test_damaged_bytes_are_refused(damage: str, tmp_path: Path) -> None:
    file = write(tmp_path, [{"scheduler": {"lr": 0.5}}])
    content = file.read_bytes()
    middle = len(BEFORE) + 60
    if damage in ("gone", "a folder"):
        file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage != "gone":
        file.write_bytes(
            {
                "cut off": content[: len(content) // 2],
                "zeros": BEFORE + bytes(len(content) - len(BEFORE)),
                "flipped": content[:middle] + bytes(byte ^ 255 for byte in content[middle : middle + 40])
                + content[middle + 40 :],
            }[damage]
        )  # fmt: skip
    with pytest.raises(ValueError) as caught:
        read_common(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{file} is refused at {KEY}: ") and "\n" not in said, said


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"scheduler": 1}, {}),
        ([], {}),
        (5, {}),
        ([{}], {"offset": -1}),
        ([{}], {"offset": 1 << 40}),
        ([{}], {"length": 3}),
        ([{}], {"length": 1 << 60}),
        ([{}], {"length": "all"}),
    ],
)
def test_what_points_elsewhere_is_refused(value: Any, place: dict, tmp_path: Path) -> None:
    file = write(tmp_path, value, **place)
    with pytest.raises(ValueError) as caught:
        read_common(tmp_path)
    assert str(caught.value).startswith(f"{file} is refused at {KEY}: "), str(caught.value)


def test_neither_form_is_there(tmp_path: Path) -> None:
    write(tmp_path, [{}])
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.storage_data.clear()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"has neither common\.pt nor the entry common_state/shard_0_1"):
        read_common(tmp_path)


def lose_a_rank(*args: Any, **kwargs: Any) -> None:
    torch.distributed.barrier()  # fails inside torch.distributed, as it does when a rank has gone


def no_memory(*args: Any, **kwargs: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def our_own(*args: Any, **kwargs: Any) -> None:
    read_common(Path("/nowhere"))


@pytest.mark.parametrize("fail", [lose_a_rank, no_memory, our_own])
def test_what_is_not_of_the_files_is_not_called_so(
    fail: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_dist.dist_checkpointing, "load", fail)
    with pytest.raises(Exception) as caught:
        load_sharded({}, tmp_path)
    assert "is refused" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyError("optimizer"), RuntimeError("PytorchStreamReader failed"), EOFError()])
def test_what_damaged_bytes_raise_is_refused(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(torch_dist.dist_checkpointing, "load", fail)
    with pytest.raises(ValueError) as caught:
        load_sharded({}, tmp_path)
    assert str(caught.value).startswith(f"checkpoint {tmp_path} is refused: {type(error).__name__}")
