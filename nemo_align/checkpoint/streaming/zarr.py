"""zarr version 2 arrays as Megatron-core wrote them, read straight from their chunk files.

Each tensor is a folder: `.zarray` describes it in JSON, and each chunk is a raw file named by its place in the grid
("3.0.7"). Megatron-core left them uncompressed and gave bfloat16 its own name, which no zarr library knows; support for
the format has since been removed from it.
"""

from __future__ import annotations

import json
import math

import torch

from nemo_align.checkpoint.streaming.locations import Files
from nemo_align.checkpoint.streaming.tensors import Piece, StoredTensor

ARRAY_FILE = ".zarray"
_DTYPES = {"bfloat16": torch.bfloat16, "<f4": torch.float32, "<f2": torch.float16}
_EXPECTED = {"zarr_format": 2, "compressor": None, "filters": None, "order": "C"}
_MOST_DIMENSIONS, _LARGEST = 3, 1 << 50
_MOST_CHUNKS, _MOST_ACROSS = 1 << 16, 1 << 10  # 96 layers cut for TP 8 are 768; across a row there are as many as TP
_LONGEST = 1 << 16  # bytes of a description; those of the published arrays have 261 at most


class ZarrArray:
    """The array in `files` whose folder is `folder`, with a '/' at its end.

    Raises:
        ValueError: no or broken `.zarray`, a variant that Megatron-core does not write (named), absurd sizes; where a
            tensor is asked for: a chunk that is missing or not as long as the description says.
    """

    def __init__(self, files: Files, folder: str) -> None:
        self._files, self._folder = files, folder
        self._path = files.root / folder
        extent = files.find(folder + ARRAY_FILE)
        if extent is None:
            raise ValueError(f"{self._path} has no {ARRAY_FILE}")
        if extent.num_bytes > _LONGEST:
            raise ValueError(f"{self._path / ARRAY_FILE} has {extent.num_bytes:,} bytes: that is no description")
        try:
            described = json.loads(extent.read())
            self.shape, chunks = tuple(described["shape"]), tuple(described["chunks"])
            dtype, self._separator = described["dtype"], described.get("dimension_separator", ".")
            found = {key: described.get(key) for key in _EXPECTED}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self._path / ARRAY_FILE} is damaged: {error!r}") from None
        for key, expected in _EXPECTED.items():
            if found[key] != expected:
                raise ValueError(f"{self._path / ARRAY_FILE}: {key} is {found[key]!r}, only {expected!r} can be read")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"{self._path / ARRAY_FILE}: dtype is {dtype!r}, {', '.join(_DTYPES)} can be read")
        if self._separator not in (".", "/"):
            raise ValueError(f"{self._path / ARRAY_FILE}: dimension_separator is {self._separator!r}")
        self.dtype = _DTYPES[dtype]
        sizes_make_sense = all(type(size) is int and 0 < size < _LARGEST for size in (*self.shape, *chunks))
        if not (sizes_make_sense and 1 <= len(self.shape) <= _MOST_DIMENSIONS and len(chunks) == len(self.shape)):
            raise ValueError(
                f"{self._path / ARRAY_FILE}: shape {list(self.shape)}, chunks {list(chunks)} make no sense"
            )
        # A chunk at the edge is stored at full size; only its rows could be left out without a gap in each row.
        if any(size % chunk for size, chunk in zip(self.shape[1:], chunks[1:], strict=True)):
            raise ValueError(f"{self._path / ARRAY_FILE}: chunks {list(chunks)} do not divide {list(self.shape)}")
        self._chunks = chunks
        self._grid = tuple(-(-size // chunk) for size, chunk in zip(self.shape, chunks, strict=True))
        too_many = math.prod(self._grid) > _MOST_CHUNKS or max(self._grid[1:], default=0) > _MOST_ACROSS
        if too_many or math.prod(self.shape) > _LARGEST:
            raise ValueError(f"{self._path / ARRAY_FILE}: {math.prod(self._grid):,} chunks make no sense")

    def stored(self, layer: int | None = None) -> StoredTensor:
        """The tensor to be read by rows; `layer`: one entry of its first dimension, as a tensor of its own."""
        name = self._folder.rstrip("/") + ("" if layer is None else f"[{layer}]")
        if layer is None:
            if len(self.shape) > 2:
                raise ValueError(f"{name} has {len(self.shape)} dimensions where a matrix or a vector is expected")
            shape, chunks, grid, prefix, skipped = self.shape, self._chunks, self._grid, (), 0
        else:
            place, within = divmod(layer, self._chunks[0])
            shape, chunks, grid, prefix = self.shape[1:], self._chunks[1:], self._grid[1:], (place,)
            skipped = within * math.prod(chunks) * self.dtype.itemsize
        columns = chunks[1] if len(chunks) > 1 else 1
        pieces = []
        for row in range(grid[0]):
            for column in range(grid[1] if len(grid) > 1 else 1):
                inner = (row, column) if len(grid) > 1 else (row,)
                path, start = self._chunk((*prefix, *inner))
                rows = min(chunks[0], shape[0] - row * chunks[0])
                pieces.append(Piece(path, start + skipped, row * chunks[0], rows, column * columns, columns))
        return StoredTensor(name, shape, self.dtype, pieces)

    def _chunk(self, place: tuple[int, ...]) -> tuple[str, int]:
        name = self._folder + self._separator.join(str(number) for number in place)
        extent = self._files.find(name)
        if extent is None:
            raise ValueError(f"{self._files.root / name} is missing: the checkpoint was not copied whole")
        expected = math.prod(self._chunks) * self.dtype.itemsize
        if extent.num_bytes != expected:
            raise ValueError(f"{self._files.root / name} has {extent.num_bytes:,} bytes, {expected:,} expected")
        return extent.path, extent.start
