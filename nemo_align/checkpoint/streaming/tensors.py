"""Tensors as recipes: where the rows of a tensor come from, without the values.

A `RowSource` can read any stretch of its rows into a buffer. Stored ones read files; the others are made of sources:
rows of several joined (query, key and value heads apart or together), rows of zeros (vocabulary padding), another
number format. So the whole mapping between two formats is put together before a byte is read, and is then carried out
a slab of rows at a time.

A row is everything behind the first dimension: a vector of H values has H rows.
"""

from __future__ import annotations

import math
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from nemo_align.checkpoint.streaming.locations import fill


class RowSource(Protocol):
    """A tensor whose rows can be read. One that is made of others names them in `sources`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def read_rows(self, first: int, last: int, out: memoryview) -> None:
        """Put rows [first, last) into `out`, which has exactly their bytes (C order, little endian)."""


def row_values(source: RowSource) -> int:
    """Values in one row."""
    return math.prod(source.shape[1:])


def row_bytes(source: RowSource) -> int:
    """Bytes of one row."""
    return row_values(source) * source.dtype.itemsize


def num_bytes(source: RowSource) -> int:
    """Bytes of the whole tensor."""
    return source.shape[0] * row_bytes(source)


def read(source: RowSource, first: int = 0, last: int | None = None) -> torch.Tensor:
    """Rows [first, last) as a tensor in memory; all by default."""
    last = source.shape[0] if last is None else last
    out = torch.empty((last - first, *source.shape[1:]), dtype=source.dtype)
    if out.numel():
        source.read_rows(first, last, as_bytes(out))
    return out


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a tensor, stored row by row without gaps: rows and columns it covers, and where its bytes begin."""

    path: str
    start: int
    row: int
    rows: int
    column: int
    columns: int


class StoredTensor:
    """A tensor in files, in one piece or cut along rows and columns.

    Raises:
        ValueError: the pieces do not cover the tensor exactly.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: Sequence[Piece]) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self.pieces = sorted(pieces, key=lambda piece: (piece.row, piece.column))
        self._first_rows = [piece.row for piece in self.pieces]
        self._check()

    def read_rows(self, first: int, last: int, out: memoryview) -> None:
        width, item = row_values(self), self.dtype.itemsize
        band = self._pieces_of(first, last)
        descriptors: dict[str, int] = {}
        try:
            for piece in band:
                begin, end = max(first, piece.row), min(last, piece.row + piece.rows)
                start = piece.start + (begin - piece.row) * piece.columns * item
                if piece.path not in descriptors:
                    descriptors[piece.path] = os.open(piece.path, os.O_RDONLY)
                descriptor = descriptors[piece.path]
                if piece.columns == width:
                    target = out[(begin - first) * width * item : (end - first) * width * item]
                    fill(descriptor, piece.path, start, target)
                    continue
                with scratch((end - begin) * piece.columns * item) as block:
                    fill(descriptor, piece.path, start, block)
                    rows = np.frombuffer(out, np.uint8).reshape(last - first, width * item)
                    columns = slice(piece.column * item, (piece.column + piece.columns) * item)
                    source = np.frombuffer(block, np.uint8).reshape(end - begin, piece.columns * item)
                    rows[begin - first : end - first, columns] = source
        except OSError as error:
            raise ValueError(f"{self.name} cannot be read from {error.filename}: {error.strerror}") from None
        finally:
            for descriptor in descriptors.values():
                os.close(descriptor)

    def read_box(self, rows: slice, columns: slice) -> torch.Tensor:
        """Part of the rows and of the columns of a matrix: what one tensor-parallel rank holds."""
        if columns == slice(0, row_values(self)) or len(self.shape) == 1:
            return read(self, rows.start, rows.stop)
        item, count = self.dtype.itemsize, columns.stop - columns.start
        out = torch.empty((rows.stop - rows.start, count), dtype=self.dtype)
        if len(self.pieces) > 1 or not out.numel():
            return read(self, rows.start, rows.stop)[:, columns].contiguous() if out.numel() else out
        piece, view = self.pieces[0], as_bytes(out)
        try:
            descriptor = os.open(piece.path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{self.name} cannot be read from {error.filename}: {error.strerror}") from None
        try:
            for number, row in enumerate(range(rows.start, rows.stop)):
                start = piece.start + (row * piece.columns + columns.start) * item
                fill(descriptor, piece.path, start, view[number * count * item : (number + 1) * count * item])
        finally:
            os.close(descriptor)
        return out

    def _pieces_of(self, first: int, last: int) -> Iterator[Piece]:
        """Pieces with rows in [first, last)."""
        stop = bisect_right(self._first_rows, last - 1)
        return (piece for piece in self.pieces[:stop] if piece.row + piece.rows > first)

    def _check(self) -> None:
        width, covered = row_values(self), 0
        for number, piece in enumerate(self.pieces):
            covered += piece.rows * piece.columns
            inside = piece.row + piece.rows <= self.shape[0] and piece.column + piece.columns <= width
            if min(piece.row, piece.column, piece.rows, piece.columns) < 0 or not inside:
                raise ValueError(f"{piece.path} holds a piece that lies outside of {self.name} {list(self.shape)}")
            for other in self.pieces[number + 1 :]:
                if other.row >= piece.row + piece.rows:
                    break
                if other.column < piece.column + piece.columns and piece.column < other.column + other.columns:
                    raise ValueError(f"{piece.path} and {other.path} hold the same part of {self.name}: damaged")
        if covered != self.shape[0] * width:
            raise ValueError(
                f"{self.name} {list(self.shape)} has {self.shape[0] * width:,} values, its pieces hold {covered:,}: "
                "the checkpoint is damaged or was not copied whole"
            )


class HeldTensor:
    """A small tensor in memory, for values that are computed beforehand."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.contiguous()
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype

    def read_rows(self, first: int, last: int, out: memoryview) -> None:
        out[:] = as_bytes(self._tensor[first:last])


class Zeros:
    """Rows of zeros."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def read_rows(self, first: int, last: int, out: memoryview) -> None:
        np.frombuffer(out, np.uint8)[:] = 0


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows [first, last) of a source."""

    source: RowSource
    first: int
    last: int


class Joined:
    """Rows of several sources, one below the other."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        self.slices = tuple(slices)
        self._starts = [0]
        for part in self.slices:
            self._starts.append(self._starts[-1] + part.last - part.first)
        tails = {(part.source.shape[1:], part.source.dtype) for part in self.slices}
        assert len(tails) == 1, tails
        tail, self.dtype = tails.pop()
        self.shape = (self._starts[-1], *tail)
        self.sources = tuple({id(part.source): part.source for part in self.slices}.values())

    def read_rows(self, first: int, last: int, out: memoryview) -> None:
        width = row_bytes(self)
        row = first
        while row < last:
            number = bisect_right(self._starts, row) - 1
            part, start = self.slices[number], self._starts[number]
            end = min(last, self._starts[number + 1])
            target = out[(row - first) * width : (end - first) * width]
            part.source.read_rows(part.first + row - start, part.first + end - start, target)
            row = end


def pieces_in(source: RowSource) -> Iterator[tuple[Piece, int]]:
    """Every stored piece that a source reads from, with the bytes of one value."""
    if isinstance(source, StoredTensor):
        yield from ((piece, source.dtype.itemsize) for piece in source.pieces)
    for part in getattr(source, "sources", ()):
        yield from pieces_in(part)


def rows_of(source: RowSource, first: int, last: int) -> RowSource:
    """Rows [first, last) of a source as a tensor of their own."""
    return source if (first, last) == (0, source.shape[0]) else Joined([Slice(source, first, last)])


class Converted:
    """Another number format, rounded to the nearest.

    Reading raises ValueError where a finite value becomes infinite.
    """

    def __init__(self, source: RowSource, dtype: torch.dtype, name: str) -> None:
        self._source, self._name = source, name
        self.shape, self.dtype = source.shape, dtype
        self.sources = (source,)

    def read_rows(self, first: int, last: int, out: memoryview) -> None:
        with scratch((last - first) * row_bytes(self._source)) as block:
            self._source.read_rows(first, last, block)
            before = torch.frombuffer(block, dtype=self._source.dtype)
            round_into(before, torch.frombuffer(out, dtype=self.dtype), self._name)


def round_into(before: torch.Tensor, after: torch.Tensor, name: str) -> None:
    """Put values into a tensor of another number format, each rounded to the nearest; `name` is for the error.

    Raises:
        ValueError: a finite value would become infinite.
    """
    after.copy_(before)
    if torch.finfo(after.dtype).max < torch.finfo(before.dtype).max:
        lost = torch.isinf(after) & torch.isfinite(before)
        if lost.any():
            value = float(before[lost][0])
            raise ValueError(f"{name} holds {value:g}, too large for {after.dtype}: keep its format")


def converted(source: RowSource, dtype: torch.dtype, name: str) -> RowSource:
    """A source in a number format; itself where it has it already."""
    return source if source.dtype == dtype else Converted(source, dtype, name)


class _Buffers(threading.local):
    """What a thread reads into before it puts values in place: one buffer for each level that is in use at once."""

    def __init__(self) -> None:
        self.levels: list[np.ndarray] = []
        self.in_use = 0


_own = _Buffers()


@contextmanager
def scratch(size: int) -> Iterator[memoryview]:
    """A buffer of `size` bytes. A thread keeps its buffers for the next slab: fresh memory costs a fault per 4 KiB."""
    level = _own.in_use
    if level == len(_own.levels):
        _own.levels.append(np.empty(size, np.uint8))
    elif len(_own.levels[level]) < size:
        _own.levels[level] = np.empty(size, np.uint8)
    _own.in_use += 1
    try:
        yield memoryview(_own.levels[level])[:size]
    finally:
        _own.in_use -= 1


def release_scratch() -> None:
    """Give back the buffers of this thread."""
    assert _own.in_use == 0
    _own.levels = []
