"""safetensors files: reading headers, and laying out the files of a folder before any value is known.

A safetensors file is eight bytes with the header's length, the header in JSON, then the tensors one after the other.
So with names, number formats and shapes given first, every byte has its place and tensors may be written in any order.
The library of that name maps files into memory and writes whole tensors; here both go by positioned reads and writes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nemo_align.checkpoint.streaming.locations import Extent, FolderFiles
from nemo_align.checkpoint.streaming.tensors import Piece, RowSource, StoredTensor, num_bytes, read, row_values

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5 * 10**9
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
_OTHER_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_OTHER_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class Entry:
    """A tensor as a header describes it."""

    file: str
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    extent: Extent


class SafetensorsFolder:
    """Tensors of a folder by name, from `model.safetensors` or from the shards that the index names.

    Raises:
        ValueError: no weights, an index that names files or tensors that are not there, a damaged file.
    """

    def __init__(self, folder: Path | str, *, single: str | None = None) -> None:
        """`single`: one file of another name, without an index."""
        self.folder = Path(folder)
        self._where = FolderFiles(folder)
        self.entries: dict[str, Entry] = {}
        index = self._where.find(INDEX) if single is None else None
        if index is not None:
            self._read_index(index)
            files = {entry.file for entry in self.entries.values()}
            if self._where.find(SINGLE) is not None and SINGLE not in files:  # transformers takes one, we the others
                raise ValueError(
                    f"{folder} has both {SINGLE} and {INDEX}, which names other files: remove the stale one"
                )
        elif self._where.find(single or SINGLE) is not None:
            self.entries = self._read_header(single or SINGLE)
        else:
            raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}; pickled weights (.bin) are not read")

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self.entries[name].shape

    def dtype(self, name: str) -> str:
        """Number format as safetensors spells it: F32, BF16, ..."""
        return self.entries[name].dtype

    def stored(self, name: str) -> StoredTensor:
        """A tensor of at least one dimension, to be read by rows.

        Raises:
            ValueError: its number format is none of those that weights come in.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{self.folder / entry.file}: {name} is {entry.dtype}, {', '.join(DTYPES)} can be read")
        rows, columns = entry.shape[0], math.prod(entry.shape[1:])
        piece = Piece(entry.extent.path, entry.extent.start, 0, rows, 0, columns)
        return StoredTensor(name, entry.shape, DTYPES[entry.dtype], [piece])

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        return read(self.stored(name))

    def _read_index(self, index: Extent) -> None:
        try:
            weight_map = json.loads(index.read())["weight_map"]
            if not all(isinstance(file, str) for file in weight_map.values()):
                raise TypeError("weight_map names something else than files")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.folder / INDEX} is damaged: {error!r}") from None
        headers: dict[str, dict[str, Entry]] = {}
        for file in sorted(set(weight_map.values())):
            if "/" in file or self._where.find(file) is None:
                raise ValueError(f"{self.folder / INDEX} names {file}, which is not in the folder: download it again")
            headers[file] = self._read_header(file)
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise ValueError(f"{self.folder / file} lacks {name}, which {INDEX} says it holds")
            self.entries[name] = headers[file][name]
        for file, header in headers.items():
            if unlisted := sorted(header.keys() - weight_map.keys()):
                raise ValueError(f"{self.folder / file} holds {', '.join(unlisted[:6])}, which {INDEX} does not list")

    def _read_header(self, file: str) -> dict[str, Entry]:
        extent = self._where.find(file)
        assert extent is not None, file
        try:
            return _parse_header(file, extent)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{self.folder / file} is not a whole safetensors file: {reason}") from None


def _parse_header(file: str, extent: Extent) -> dict[str, Entry]:
    if extent.num_bytes < 8:
        raise ValueError(f"it has {extent.num_bytes} bytes")
    length = int.from_bytes(extent.part(0, 8).read(), "little")
    if length > min(_LONGEST_HEADER, extent.num_bytes - 8):
        raise ValueError(f"its header claims {length:,} bytes, the file has {extent.num_bytes:,}")
    header = json.loads(extent.part(8, length).read())
    header.pop("__metadata__", None)
    data = extent.num_bytes - 8 - length
    entries, ends = {}, []
    for name, described in header.items():
        begin, end = described["data_offsets"]
        shape, dtype = tuple(described["shape"]), described["dtype"]
        if not all(isinstance(size, int) and size >= 0 for size in (begin, end, *shape)):
            raise ValueError(f"{name} has shape {list(shape)} and offsets {[begin, end]}")
        if not begin <= end <= data:
            raise ValueError(f"{name} lies at bytes {begin:,} to {end:,} of {data:,}")
        item = DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_BYTES.get(dtype)
        if item is None:
            raise ValueError(f"{name} has the unknown number format {dtype!r}")
        if end - begin != item * math.prod(shape):
            raise ValueError(f"{name} {dtype} {list(shape)} has {end - begin:,} bytes")
        entries[name] = Entry(file, dtype, shape, extent.part(8 + length + begin, end - begin))
        ends.append((begin, end))
    end_before = 0
    for begin, end in sorted(ends):
        if begin != end_before:
            raise ValueError(f"its tensors leave a gap or overlap at byte {begin:,}")
        end_before = end
    if end_before != data:
        raise ValueError(f"its tensors end at byte {end_before:,}, the file at {data:,}")
    return entries


@dataclass
class Shard:
    """A file to be written: its header, and where each tensor's values begin."""

    file: str
    tensors: dict[str, RowSource] = field(default_factory=dict)

    @property
    def header(self) -> bytes:
        """Everything before the values."""
        table: dict = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
        offset = 0
        for name, source in self.tensors.items():
            end = offset + num_bytes(source)
            table[name] = {
                "dtype": DTYPE_NAMES[source.dtype],
                "shape": list(source.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # values begin at a multiple of 8
        return len(text).to_bytes(8, "little") + text


def lay_out(tensors: dict[str, RowSource], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> list[Shard]:
    """Tensors in order, in one file or in shards of at most `max_shard_bytes` (or one tensor each)."""
    groups: list[dict[str, RowSource]] = [{}]
    filled = 0
    for name, source in tensors.items():
        assert row_values(source) > 0 and source.shape[0] > 0, name
        size = num_bytes(source)
        if groups[-1] and filled + size > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = source
        filled += size
    if len(groups) == 1:
        return [Shard(SINGLE, groups[0])]
    count = len(groups)
    return [
        Shard(f"model-{number:05d}-of-{count:05d}.safetensors", group) for number, group in enumerate(groups, start=1)
    ]


def index_of(shards: list[Shard]) -> bytes | None:
    """The text of the index file; None where there is one file."""
    if len(shards) == 1:
        return None
    total = sum(num_bytes(source) for shard in shards for source in shard.tensors.values())
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
