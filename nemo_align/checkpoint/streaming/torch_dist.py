"""torch_dist checkpoints by tensor, with no process group and no model: reading any, and laying out new ones.

Each tensor is stored in pieces, each piece an archive of `torch.save` inside a `.distcp` file; `.metadata` says where.
What we lay out has pieces of whole rows, small enough to be made in one go, so that no tensor is ever held whole; torch
and both ends of megatron-core load them under any layout.
"""

from __future__ import annotations

import json
import math
import pickle
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_align.checkpoint.safe_reading import METADATA_FILE, parse_metadata
from nemo_align.checkpoint.streaming.locations import Extent, Files, FolderFiles
from nemo_align.checkpoint.streaming.tensors import Piece, RowSource, StoredTensor, read, row_bytes
from nemo_align.checkpoint.streaming.torch_archive import Wrapper, find_values

COMMON_FILE = "common.pt"
CONFIG_FILE = "metadata.json"
CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
CONFIG |= {"common_backend": "torch", "common_backend_version": 1}
FILE_BYTES = 4 << 30  # of a .distcp file that we lay out


class TensorReader:
    """The tensors of a torch_dist checkpoint by key. `folder` is a prefix in `files` with a '/' at its end, or ''.

    Raises:
        ValueError: no metadata, damaged or malicious metadata. Where a tensor is asked for: its pieces are missing,
            overlap, leave gaps, or are no plain tensors of the declared shape and number format.
    """

    def __init__(self, where: Path | str | Files, folder: str = "") -> None:
        self._files: Files = FolderFiles(where) if isinstance(where, str | Path) else where
        self._prefix = folder
        self.folder = self._files.root / folder
        extent = self._files.find(folder + METADATA_FILE)
        if extent is None:
            raise ValueError(
                f"{self.folder} has no {METADATA_FILE}: it is not a torch_dist checkpoint, or its save was cut off"
            )
        metadata = parse_metadata(extent.read(), self.folder / METADATA_FILE)
        self._tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._places: dict[str, dict[tuple, _StorageInfo]] = defaultdict(dict)
        for index, info in (metadata.storage_data or {}).items():
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

    def stored(self, key: str, layer: int | None = None) -> StoredTensor:
        """A tensor to be read by rows; `layer`: one entry of its first dimension, as a tensor of its own."""
        entry = self._tensors[key]
        shape, dtype = tuple(entry.size), entry.properties.dtype
        name = key if layer is None else f"{key}[{layer}]"
        inner = shape if layer is None else shape[1:]
        pieces = []
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if len(offsets) != len(shape) or len(sizes) != len(shape) or min((*offsets, *sizes), default=0) < 0:
                raise ValueError(f"{self.folder / METADATA_FILE} is refused: a piece of {key} makes no sense")
            skipped = 0
            if layer is not None:
                if not offsets[0] <= layer < offsets[0] + sizes[0]:
                    continue
                skipped = (layer - offsets[0]) * math.prod(sizes[1:]) * dtype.itemsize
            start = self._find_piece(key, offsets, sizes, dtype)
            box = (offsets, sizes) if layer is None else (offsets[1:], sizes[1:])
            pieces.append(_piece(start.path, start.start + skipped, inner, *box, f"{self.folder}: {key}"))
        return StoredTensor(name, inner, dtype, pieces)

    def read(self, key: str) -> torch.Tensor:
        """A whole tensor."""
        if not self.shape(key):
            return read(_scalar(self, key))[0]
        return read(self.stored(key))

    def _find_piece(self, key: str, offsets: tuple, sizes: tuple, dtype: torch.dtype) -> Extent:
        info = self._places[key].get(offsets)
        if info is None:
            raise ValueError(f"{self.folder}: the piece of {key} at {list(offsets)} is not stored: it is damaged")
        path = self.folder / info.relative_path
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{path} is refused: {key} is stored with {info.transform_descriptors}, not as it is")
        extent = self._files.find(self._prefix + info.relative_path)
        if extent is None:
            raise ValueError(f"{path}, which holds {key}, is missing")
        if info.offset < 0 or info.length < 0 or info.offset + info.length > extent.num_bytes:
            raise ValueError(f"{path} has {extent.num_bytes:,} bytes; {key} lies beyond its end: copy it again")
        try:
            found = find_values(extent.part(info.offset, info.length))
        except ValueError as error:
            raise ValueError(f"{path} is refused at {key}: {error}") from None
        if (found.dtype, found.shape) != (dtype, sizes):
            raise ValueError(
                f"{self.folder}: the piece of {key} at {list(offsets)} is {found.dtype} {list(found.shape)}, "
                f"{dtype} {list(sizes)} expected: the checkpoint is damaged"
            )
        return found.values


def _scalar(reader: TensorReader, key: str) -> StoredTensor:
    dtype = reader.dtype(key)
    extent = reader._find_piece(key, (), (), dtype)
    return StoredTensor(key, (1,), dtype, [Piece(extent.path, extent.start, 0, 1, 0, 1)])


def _piece(path: str, start: int, shape: tuple, offsets: tuple, sizes: tuple, what: str) -> Piece:
    """A box of a tensor as rows and columns. Only its first two dimensions may be cut."""
    if sizes[2:] != shape[2:]:
        raise ValueError(f"{what} {list(shape)} is cut along its third dimension: it cannot be read by rows")
    inner = math.prod(shape[2:])
    column, columns = (offsets[1] * inner, sizes[1] * inner) if len(shape) > 1 else (0, 1)
    return Piece(path, start, offsets[0], sizes[0], column, columns)


@dataclass(frozen=True)
class Stretch:
    """Rows [first, last) of a tensor, stored as an archive of their own."""

    key: str
    source: RowSource
    first: int
    last: int
    start: int  # of the archive in its file
    wrapper: Wrapper


@dataclass(frozen=True)
class DistcpFile:
    """A `.distcp` file to be written."""

    name: str
    stretches: list[Stretch]


def lay_out(tensors: dict[str, RowSource], part_bytes: int, file_bytes: int = FILE_BYTES) -> list[DistcpFile]:
    """Files of about `file_bytes`, of archives with at most `part_bytes` of values (or one row)."""
    files = [DistcpFile("__0_0.distcp", [])]
    position = 0
    for key, source in tensors.items():
        for first, last in slabs(source, part_bytes):
            wrapper = Wrapper(source.dtype, (last - first, *source.shape[1:]))
            if files[-1].stretches and position + wrapper.num_bytes > file_bytes:
                files.append(DistcpFile(f"__0_{len(files)}.distcp", []))
                position = 0
            files[-1].stretches.append(Stretch(key, source, first, last, position, wrapper))
            position += wrapper.num_bytes
    return files


def slabs(source: RowSource, part_bytes: int) -> Iterator[tuple[int, int]]:
    """Rows of a tensor in stretches of at most `part_bytes` (or one row)."""
    rows = max(1, part_bytes // row_bytes(source))
    for first in range(0, source.shape[0], rows):
        yield first, min(first + rows, source.shape[0])


def metadata_of(files: list[DistcpFile]) -> bytes:
    """The `.metadata` of a checkpoint of these files."""
    entries: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for file in files:
        for stretch in file.stretches:
            shape = stretch.source.shape
            if stretch.key not in entries:
                properties = TensorProperties(dtype=stretch.source.dtype)
                entries[stretch.key] = TensorStorageMetadata(properties, torch.Size(shape), [])
            chunks = entries[stretch.key].chunks
            offsets = torch.Size([stretch.first] + [0] * (len(shape) - 1))
            sizes = torch.Size([stretch.last - stretch.first, *shape[1:]])
            place = _StorageInfo(file.name, stretch.start, stretch.wrapper.num_bytes)
            places[MetadataIndex(stretch.key, offsets, len(chunks))] = place
            chunks.append(ChunkStorageMetadata(offsets, sizes))
    return pickle.dumps(Metadata(entries, storage_data=places, storage_meta=StorageMeta()))


def config_of() -> bytes:
    """The `metadata.json` that tells Megatron-core the format."""
    return json.dumps(CONFIG).encode()
