"""Reading and writing torch_dist files without a process group; what `.metadata` may name."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_align.checkpoint.safe_reading import read_metadata, restricted_reading
from nemo_align.checkpoint.streaming.torch_dist import TensorReader
from tests.checkpoint_files import write_torch_dist

TENSORS = {"a.weight": torch.randn(6, 4), "b": torch.randn(5).bfloat16(), "c": torch.arange(12.0).reshape(3, 4)[1:]}


def write(folder: Path) -> None:
    write_torch_dist(folder, TENSORS, part_bytes=32)  # two rows of `a.weight`


def test_torchs_reader_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path)
    found = {key: torch.empty_like(tensor) for key, tensor in TENSORS.items()}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    assert all(torch.equal(found[key], tensor) for key, tensor in TENSORS.items())
    # A slice is stored alone, not with the storage that it looks into.
    assert (tmp_path / "__0_0.distcp").stat().st_size < 6000


def test_we_read_what_torch_writes(tmp_path: Path) -> None:
    dcp.save(dict(TENSORS), checkpoint_id=tmp_path, no_dist=True)
    reader = TensorReader(tmp_path)
    assert reader.names() == sorted(TENSORS)
    for key, tensor in TENSORS.items():
        assert reader.shape(key) == tuple(tensor.shape) and reader.dtype(key) == tensor.dtype
        assert torch.equal(reader.read(key), tensor)


def test_damaged_pieces_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    metadata = read_metadata(tmp_path)
    metadata.state_dict_metadata["b"].size = torch.Size([9])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"b \[9\] has 9 values, its pieces hold 5"):
        TensorReader(tmp_path).read("b")
    places = metadata.storage_data
    metadata.storage_data = {index: info for index, info in places.items() if index.fqn != "c"}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"the piece of c at \[0, 0\] is not stored"):
        TensorReader(tmp_path).read("c")


class Malicious:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return (Path.touch, (self.witness,))


@pytest.mark.parametrize("content", [b"", b"\x80\x05garbage", pickle.dumps({"a": 1}), pickle.dumps(print)])
def test_metadata_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match="is refused"):
        read_metadata(tmp_path)


def test_malicious_metadata_does_not_run(tmp_path: Path) -> None:
    write(tmp_path)
    metadata = read_metadata(tmp_path)
    metadata.planner_data = Malicious(tmp_path / "witness")  # inside an otherwise good file
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="is refused: it names"):
        TensorReader(tmp_path)
    with restricted_reading(), pytest.raises(ValueError, match="is refused: it names"):
        dcp.FileSystemReader(tmp_path).read_metadata()
    assert not (tmp_path / "witness").exists()


def test_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    metadata = read_metadata(tmp_path)
    for info in metadata.storage_data.values():
        info.relative_path = "../other.distcp"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="lies outside the folder"):
        read_metadata(tmp_path)


def test_the_limits_end_with_the_block(tmp_path: Path) -> None:
    before = (torch.load, dcp.FileSystemReader.read_metadata)
    with restricted_reading():
        assert torch.load is not before[0]
    assert (torch.load, dcp.FileSystemReader.read_metadata) == before
