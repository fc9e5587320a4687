"""Reading and writing torch_dist files tensor by tensor, with no process group and no model.

For conversion: one tensor in memory at a time, whatever the checkpoint's size. Reading is restricted as in
`safe_reading`; writing puts down what torch's reader and both ends of megatron-core load under any layout.
"""

from __future__ import annotations

import json
import os
import pickle
from collections import defaultdict
from pathlib import Path

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from nemo_align.checkpoint.manifest import write_durably
from nemo_align.checkpoint.safe_reading import METADATA_FILE, read_metadata

COMMON_FILE = "common.pt"
CONFIG_FILE = "metadata.json"
CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
CONFIG |= {"common_backend": "torch", "common_backend_version": 1}


class TensorReader:
    """The tensors of a torch_dist checkpoint by key.

    Raises ValueError where a tensor's pieces are missing, overlap the wrong place, or have another shape than declared.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        metadata = read_metadata(self.folder)
        self._tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._places: dict[str, dict[tuple, _StorageInfo]] = defaultdict(dict)
        for index, info in metadata.storage_data.items():
            if index.offset is not None:
                self._places[index.fqn][tuple(index.offset)] = info

    def names(self) -> list[str]:
        """Keys of all tensors, the optimizer's too."""
        return sorted(self._tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a tensor."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Number format of a tensor."""
        return self._tensors[key].properties.dtype

    def read(self, key: str) -> torch.Tensor:
        """The whole tensor, put together from the pieces that ranks wrote."""
        entry = self._tensors[key]
        whole = torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        covered = 0
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            piece = self._read_piece(key, offsets)
            if tuple(piece.shape) != sizes or piece.dtype != whole.dtype:
                raise ValueError(
                    f"{self.folder}: the piece of {key} at {list(offsets)} is {piece.dtype} {list(piece.shape)}, "
                    f"{whole.dtype} {list(sizes)} expected: the checkpoint is damaged"
                )
            if any(offset + size > most for offset, size, most in zip(offsets, sizes, whole.shape, strict=True)):
                raise ValueError(f"{self.folder}: a piece of {key} lies outside of it: the checkpoint is damaged")
            narrow_tensor_by_index(whole, offsets, sizes).copy_(piece)
            covered += piece.numel()
        if covered != whole.numel():
            raise ValueError(f"{self.folder}: {key} has {whole.numel()} values, its pieces hold {covered}: damaged")
        return whole

    def _read_piece(self, key: str, offsets: tuple[int, ...]) -> torch.Tensor:
        info = self._places[key].get(offsets)
        if info is None:
            raise ValueError(f"{self.folder}: the piece of {key} at {list(offsets)} is not stored: it is damaged")
        with open(self.folder / info.relative_path, "rb") as stream:
            view = _create_file_view(stream, info.offset, info.length)
            try:
                piece = torch.load(view, map_location="cpu", weights_only=True)
            except Exception as error:  # damaged or malicious bytes can raise anything
                reason = (str(error).splitlines() or [type(error).__name__])[0].partition(" Please ")[0]
                raise ValueError(f"{self.folder / info.relative_path} is refused at {key}: {reason}") from None
        if not isinstance(piece, torch.Tensor):
            raise ValueError(f"{self.folder / info.relative_path} is refused: {key} is no tensor in it")
        return piece


class TensorWriter:
    """Writes a torch_dist checkpoint of whole tensors into an empty folder: `write` each, then `finish`."""

    _FILE = "__0_0.distcp"

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._stream = open(self.folder / self._FILE, "wb")  # noqa: SIM115 - closed by finish
        self._entries: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Append one tensor."""
        assert key not in self._entries, key
        # A view would drag its whole storage into the file.
        tensor = tensor.detach().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        start = self._stream.tell()
        torch.save(tensor, self._stream)
        zeros = torch.Size([0] * tensor.dim())
        self._entries[key] = TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype), tensor.size(), [ChunkStorageMetadata(zeros, tensor.size())]
        )
        place = _StorageInfo(self._FILE, start, self._stream.tell() - start)
        self._places[MetadataIndex(key, zeros, 0)] = place

    def finish(self) -> None:
        """Write what makes the file a checkpoint."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        metadata = Metadata(self._entries, storage_data=self._places, storage_meta=StorageMeta())
        write_durably(self.folder / METADATA_FILE, pickle.dumps(metadata))
        torch.save({}, self.folder / COMMON_FILE)
        write_durably(self.folder / CONFIG_FILE, json.dumps(CONFIG).encode())
