"""`convert plan=true`: every tensor, where it comes from and goes to, the bytes, the disk and the time. Writes nothing.

Without a source, for a model that is still to be downloaded, the sizes come from a file in conf/model.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import torch

from nemo_align.checkpoint.conversion.model import TORCH_DTYPES, Model, expected_shapes
from nemo_align.checkpoint.conversion.target import Target
from nemo_align.checkpoint.nemo.open import published_name
from nemo_align.checkpoint.streaming.tensors import RowSource, pieces_in
from nemo_align.config.conversion import ConvertConfig
from nemo_align.config.model_file import read_model
from nemo_align.runtime.folders import existing_folder

_SAMPLE_BYTES = 256 << 20
_BLOCK_BYTES = 4 << 20


class Described:
    """A tensor of which only shape and number format are known."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def read_rows(self, first: int, last: int, out: memoryview) -> None:
        raise AssertionError("a plan reads nothing")


def described_model(config: ConvertConfig) -> Model:
    """A model in bfloat16, from the sizes in conf/model.

    Raises:
        ValueError: no such file, or sizes missing in it.
    """
    assert config.architecture is not None
    sizes = read_model(config.architecture)
    tensors: dict[str, RowSource] = {
        key: Described(shape, TORCH_DTYPES["bf16"]) for key, shape in expected_shapes(sizes, None).items()
    }
    return Model(
        kind=config.source_format,
        path=Path(config.architecture),
        config=sizes,
        reward=None,
        tensors=tensors,
        tokenizer=None,
        identity="",
        stored={key: published_name(key) for key in tensors} if config.source_format == "nemo" else {},
    )


def show(target: Target, model: Model | None, config: ConvertConfig) -> None:
    """Print the plan."""
    rows = [
        (
            tensor.name,
            "x".join(map(str, tensor.shape)),
            tensor.dtype,
            f"{tensor.num_bytes:,}",
            tensor.source,
            tensor.file,
        )
        for tensor in target.planned
    ]
    head = ("tensor", "shape", "dtype", "bytes", "from", "file")
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        line = "  ".join(
            text.rjust(width) if column == 3 else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        print(line.rstrip())
    files = len({part.file for part in target.parts})
    print(f"\n{len(rows)} tensors with {target.weight_bytes:,} bytes")
    print(f"{files} files with {target.num_bytes:,} bytes")
    for note in model.notes if model is not None else ():
        print(f"note: {note}")
    print(_disk(target, config))
    print(_time(target, model, config), flush=True)


def _disk(target: Target, config: ConvertConfig) -> str:
    if config.target is None:
        return f"disk needed: {target.num_bytes / 1e9:.1f} GB (no target named: free space not compared)"
    folder = existing_folder(config.target)
    free = shutil.disk_usage(folder).free
    verdict = "enough" if free > target.num_bytes else "NOT ENOUGH"
    return f"disk needed: {target.num_bytes / 1e9:.1f} GB; free in {folder}: {free / 1e9:.1f} GB: {verdict}"


def _time(target: Target, model: Model | None, config: ConvertConfig) -> str:
    """From a sample of the disks: what is read and written by one process, forced to disk."""
    rates = {}
    if config.target is not None:
        rates["write"] = _write_rate(existing_folder(config.target))
    if model is not None and (rate := _read_rate(model)) is not None:
        rates["read"] = rate
    if not rates:
        minutes = target.num_bytes / 60e9
        return f"time: {minutes:.0f} minutes on disks of 1 GB/s; name a target or a source to measure theirs"
    seconds = target.num_bytes / min(rates.values())
    measured = ", ".join(f"{name} {rate / 1e6:.0f} MB/s" for name, rate in rates.items())
    return f"time: about {seconds / 60:.0f} minutes ({measured}, from a sample of {_SAMPLE_BYTES >> 20} MiB)"


def _write_rate(folder: Path) -> float:
    path = folder / f".tmp-rate-{os.getpid()}"
    block = os.urandom(_BLOCK_BYTES)
    size = min(_SAMPLE_BYTES, shutil.disk_usage(folder).free // 4)
    began = time.perf_counter()
    try:
        with open(path, "wb") as stream:
            for _ in range(max(1, size // _BLOCK_BYTES)):
                stream.write(block)
            stream.flush()
            os.fdatasync(stream.fileno())
    except OSError as error:
        raise ValueError(f"target={folder} cannot be written: {error.strerror}") from None
    finally:
        path.unlink(missing_ok=True)
    return max(size, _BLOCK_BYTES) / (time.perf_counter() - began)


def _read_rate(model: Model) -> float | None:
    pieces = [(piece, item) for tensor in model.tensors.values() for piece, item in pieces_in(tensor)]
    if not pieces:
        return None
    piece, item = max(pieces, key=lambda pair: pair[0].rows * pair[0].columns)
    size = min(_SAMPLE_BYTES, piece.rows * piece.columns * item)
    buffer = bytearray(_BLOCK_BYTES)
    with open(piece.path, "rb", buffering=0) as stream:
        os.posix_fadvise(stream.fileno(), piece.start, size, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
        stream.seek(piece.start)
        began, left = time.perf_counter(), size
        while left > 0 and (count := stream.readinto(buffer)):
            left -= count
    return size / max(time.perf_counter() - began, sys.float_info.epsilon)
