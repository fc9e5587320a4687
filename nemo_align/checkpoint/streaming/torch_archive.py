"""One tensor as `torch.save` writes it, without torch holding it: where its values lie, and what stands around them.

`torch.save` writes a zip archive without compression: a pickle that describes the tensor (`data.pkl`), the values
(`data/0`), and small records. Distributed checkpoints (`torch_dist`) keep each piece of a tensor as such an archive.
The pickle is read by an unpickler that knows the few names such a description needs; nothing else is ever looked up.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from math import prod

import torch
from torch._utils import _rebuild_tensor_v2

from nemo_align.checkpoint.pickle_limits import refuse_bombs
from nemo_align.checkpoint.streaming.locations import Extent, ExtentStream

_STORAGES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items()}
_LARGEST_PICKLE = 1 << 12  # a description has some hundred bytes
_LARGEST_READ = 1 << 20  # of a zip's directory
_ROOT = "archive"
_ALIGNMENT = 64  # of the values, as torch aligns them
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_DATE = 0x21  # the first of January 1980: equal values make equal files
_CHECKSUM_BEHIND = 8  # the flag of a record whose checksum and sizes follow its content
_LARGEST_ARCHIVE = 0xFFFF_FFFE  # beyond it zip needs other records; a tensor is stored in pieces well below it


@dataclass(frozen=True)
class Described:
    """What an archive holds."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Extent  # row by row, without gaps


def find_values(archive: Extent) -> Described:
    """Where in `archive` the values of its tensor lie.

    Raises:
        ValueError: not such an archive, compressed, damaged, or one whose pickle names anything but a plain tensor.
    """
    try:
        with _Archive(archive) as stream, zipfile.ZipFile(stream) as opened:
            return _described(archive, opened, stream)
    except (zipfile.BadZipFile, pickle.UnpicklingError, OSError, EOFError, struct.error) as error:
        raise ValueError(f"{error}") from None
    # RuntimeError: an encrypted record, or nesting too deep.
    except (KeyError, IndexError, TypeError, AttributeError, UnicodeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"its description makes no sense ({type(error).__name__}: {error})") from None


class _Archive(ExtentStream):
    """What `zipfile` reads. It takes an archive's word for the length of its directory: one could make it read all."""

    def read(self, size: int = -1) -> bytes:
        if max(size, 0) > _LARGEST_READ:
            raise OSError(f"it claims records of {size:,} bytes")
        return super().read(size)


def _described(archive: Extent, opened: zipfile.ZipFile, stream: _Archive) -> Described:
    records = {info.filename.partition("/")[2]: info for info in opened.infolist()}
    if "data.pkl" not in records:
        raise ValueError("it is no archive of torch.save: it has no data.pkl")
    pickled = records["data.pkl"]
    if pickled.file_size > _LARGEST_PICKLE or any(info.compress_type for info in records.values()):
        raise ValueError("its description is too long, or compressed")
    order = records.get("byteorder")
    if order is not None and (order.file_size != len(b"little") or opened.read(order) != b"little"):
        raise ValueError("its values are big endian")
    description = opened.read(pickled)
    refuse_bombs(description)
    tensor = _Description(io.BytesIO(description)).load()
    if not isinstance(tensor, _Tensor):
        raise ValueError("it holds no tensor")
    values = records[f"data/{tensor.storage.key}"]
    stream.seek(values.header_offset)
    local = _LOCAL.unpack(stream.read(_LOCAL.size))
    if local[0] != b"PK\x03\x04":
        raise ValueError("the header of its values is damaged")
    start = values.header_offset + _LOCAL.size + local[9] + local[10]
    item = tensor.storage.dtype.itemsize
    begin, count = tensor.offset * item, prod(tensor.shape) * item
    if values.file_size != tensor.storage.count * item or begin + count > values.file_size:
        raise ValueError("its values are not as long as its description says")
    if start + values.file_size > archive.num_bytes:
        raise ValueError("its values lie beyond its end")
    return Described(tensor.storage.dtype, tensor.shape, archive.part(start + begin, count))


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]


def _tensor(storage: _Storage, offset: int, shape: tuple, stride: tuple, *_: object) -> _Tensor:
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in numbers):
        raise pickle.UnpicklingError("it describes no plain tensor")
    expected, step = [], 1
    for size in reversed(shape):
        expected.insert(0, step)
        step *= size
    gapless = all(size == 1 or found == wanted for size, found, wanted in zip(shape, stride, expected, strict=True))
    if not gapless and prod(shape):
        raise pickle.UnpicklingError(f"its values are not stored row by row (strides {tuple(stride)})")
    return _Tensor(storage, offset, tuple(shape))


class _Description(pickle.Unpickler):
    """Reads data.pkl of a tensor; knows no name that does anything when called."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no tensor needs")

    def persistent_load(self, identity: tuple) -> _Storage:
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("it describes no storage")
        return _Storage(dtype, str(key), count)


class Wrapper:
    """What stands before and behind the values of a tensor in an archive that `torch.load` reads.

    The checksum of the values stands behind them, as torch writes it, so that they need be gone through only once.
    Raises ValueError where the values are too many for one archive.
    """

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.num_value_bytes = prod(shape) * dtype.itemsize
        if self.num_value_bytes > _LARGEST_ARCHIVE - (1 << 16):
            raise ValueError(f"a piece of {self.num_value_bytes:,} bytes is too large for one archive")
        head = bytearray()
        self._records: list[_Record] = []
        for name, content in (("data.pkl", _pickled(dtype, shape)), ("byteorder", b"little"), ("version", b"3\n")):
            self._records.append(_Record(name, zlib.crc32(content), len(content), len(head), 0))
            head += self._records[-1].local() + content
        values = _Record("data/0", 0, self.num_value_bytes, len(head), _CHECKSUM_BEHIND)
        padding = -(len(head) + len(values.local(0))) % _ALIGNMENT
        self._values = values
        self.head = bytes(head + values.local(padding))
        self.num_bytes = len(self.head) + self.num_value_bytes + len(self.tail(0))

    def tail(self, crc: int) -> bytes:
        """What follows the values, whose CRC-32 is `crc`."""
        behind = struct.pack("<4s3L", b"PK\x07\x08", crc, self.num_value_bytes, self.num_value_bytes)
        records = [*self._records, replace(self._values, crc=crc)]
        central = b"".join(record.central() for record in records)
        begin = len(self.head) + self.num_value_bytes + len(behind)
        return behind + central + _END.pack(b"PK\x05\x06", 0, 0, len(records), len(records), len(central), begin, 0)


@dataclass(frozen=True)
class _Record:
    """A member of the archive."""

    name: str
    crc: int
    size: int
    offset: int
    flags: int

    def local(self, padding: int | None = None) -> bytes:
        """What stands before its content."""
        path = f"{_ROOT}/{self.name}".encode()
        # An extra field named FB is torch's own filling.
        extra = b"" if padding is None else struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        crc, size = (0, 0) if self.flags & _CHECKSUM_BEHIND else (self.crc, self.size)
        fields = (20, self.flags, 0, 0, _DATE, crc, size, size, len(path), len(extra))
        return _LOCAL.pack(b"PK\x03\x04", *fields) + path + extra

    def central(self) -> bytes:
        """Its line in the directory at the end."""
        path = f"{_ROOT}/{self.name}".encode()
        fields = (
            20,
            20,
            self.flags,
            0,
            0,
            _DATE,
            self.crc,
            self.size,
            self.size,
            len(path),
            0,
            0,
            0,
            0,
            0,
            self.offset,
        )
        return _CENTRAL.pack(b"PK\x01\x02", *fields) + path


class _Placeholder:
    """Stands for the tensor that the pickle describes."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape

    def __reduce__(self) -> tuple:
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.insert(0, step)
            step *= size
        storage = _StoragePlaceholder(self.dtype, prod(self.shape))
        return _rebuild_tensor_v2, (storage, 0, self.shape, tuple(strides), False, OrderedDict())


@dataclass(frozen=True)
class _StoragePlaceholder:
    dtype: torch.dtype
    count: int


class _DescriptionPickler(pickle.Pickler):
    def persistent_id(self, value: object) -> tuple | None:
        if isinstance(value, _StoragePlaceholder):
            return ("storage", getattr(torch, _STORAGE_OF[value.dtype]), "0", "cpu", value.count)
        return None


def _pickled(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    _DescriptionPickler(buffer, protocol=2).dump(_Placeholder(dtype, shape))
    return buffer.getvalue()
