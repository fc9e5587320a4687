"""Reading and writing folders of safetensors files, single or sharded, one tensor in memory at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemo_align.checkpoint.manifest import write_durably

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5 * 10**9
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class SafetensorsFolder:
    """Tensors of a folder by name.

    Raises:
        ValueError: no weights, an index that names files or tensors that are not there, a damaged file.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._open_files: dict[str, object] = {}
        index = self.folder / INDEX
        if index.is_file():
            try:
                self._files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                if not all(isinstance(file, str) for file in self._files.values()):
                    raise TypeError("weight_map names something else than files")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{index} is damaged: {error!r}") from None
            for file in set(self._files.values()):
                if "/" in file or not (self.folder / file).is_file():
                    raise ValueError(f"{index} names {file}, which is not in the folder: download it again")
                stored = set(self._open(file).keys())
                if lost := sorted(name for name, place in self._files.items() if place == file and name not in stored):
                    raise ValueError(f"{self.folder / file} lacks {', '.join(lost[:6])}, which {INDEX} says it holds")
        elif (self.folder / SINGLE).is_file():
            self._files = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}; pickled weights (.bin) are not read")

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Number format as safetensors spells it: F32, BF16, ..."""
        return self._slice(name).get_dtype()

    def read(self, name: str, *parts: slice) -> Tensor:
        """A tensor, or the part of it that slices of its first dimensions select."""
        return self._slice(name)[parts or (slice(None),)]

    def _slice(self, name: str):
        return self._open(self._files[name]).get_slice(name)

    def _open(self, file: str):
        if file not in self._open_files:
            try:
                self._open_files[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.folder / file} is not a whole safetensors file: {error}") from None
        return self._open_files[file]


class SafetensorsWriter:
    """Writes tensors whose names, formats and shapes are known beforehand, in that order, into shards.

    The header of a safetensors file stands before the data and holds all offsets, so with the plan given first nothing
    needs to be held back. The index comes last.
    """

    def __init__(
        self,
        folder: Path,
        plan: list[tuple[str, torch.dtype, tuple[int, ...]]],
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        self.folder = folder
        self._shards = _split(plan, max_shard_bytes)
        self._total = sum(_num_bytes(dtype, shape) for _, dtype, shape in plan)
        self._files: dict[str, str] = {}
        self._shard = -1
        self._expected: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        self._stream = None

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor of the plan."""
        if not self._expected:
            self._begin_shard()
        planned = self._expected.pop(0)
        assert planned == (name, tensor.dtype, tuple(tensor.shape)), (planned, name, tensor.dtype, tensor.shape)
        self._stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if not self._expected:
            self._end_shard()

    def finish(self) -> None:
        """Write the index where there is more than one shard."""
        assert not self._expected and self._shard == len(self._shards) - 1, "not all planned tensors were written"
        if len(self._shards) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._files}
            write_durably(self.folder / INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())

    def _begin_shard(self) -> None:
        self._shard += 1
        self._expected = list(self._shards[self._shard])
        count = len(self._shards)
        file = SINGLE if count == 1 else f"model-{self._shard + 1:05d}-of-{count:05d}.safetensors"
        header: dict = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
        offset = 0
        for name, dtype, shape in self._expected:
            end = offset + _num_bytes(dtype, shape)
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            self._files[name] = file
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
        self._stream = open(self.folder / file, "wb")  # noqa: SIM115 - open until the shard is full
        self._stream.write(len(text).to_bytes(8, "little") + text)

    def _end_shard(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def _split(plan: list, most: int) -> list[list]:
    shards: list[list] = [[]]
    filled = 0
    for entry in plan:
        size = _num_bytes(entry[1], entry[2])
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    return shards


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count
