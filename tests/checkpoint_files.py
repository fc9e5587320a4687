"""Checkpoint files from tensors in memory, written as conversions write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from nemo_align.checkpoint.manifest import write_durably
from nemo_align.checkpoint.safe_reading import METADATA_FILE
from nemo_align.checkpoint.streaming import safetensors, torch_dist, transfer
from nemo_align.checkpoint.streaming.tensors import HeldTensor


def write_safetensors(folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_bytes: int = 10**9) -> None:
    """model.safetensors, or shards and an index."""
    held = {name: HeldTensor(tensor) for name, tensor in tensors.items()}
    shards = safetensors.lay_out(held, max_shard_bytes)
    parts = []
    for shard in shards:
        parts.append(transfer.fixed(shard.file, shard.header))
        position = len(shard.header)
        for name, source in shard.tensors.items():
            parts.append(transfer.rows(shard.file, position, name, source, 0, source.shape[0]))
            position += parts[-1].num_bytes
    make(folder, parts)
    if (index := safetensors.index_of(shards)) is not None:
        write_durably(folder / safetensors.INDEX, index)


def write_torch_dist(folder: Path, tensors: Mapping[str, torch.Tensor], part_bytes: int = transfer.PART_BYTES) -> None:
    """`.distcp` files and `.metadata`."""
    files = torch_dist.lay_out({name: HeldTensor(tensor) for name, tensor in tensors.items()}, part_bytes)
    parts = [
        transfer.archive(file.name, one.start, one.key, one.source, one.first, one.last, one.wrapper)
        for file in files
        for one in file.stretches
    ]
    make(folder, parts)
    write_durably(folder / METADATA_FILE, torch_dist.metadata_of(files))
    write_durably(folder / torch_dist.CONFIG_FILE, torch_dist.config_of())


def make(folder: Path, parts: list[transfer.Part]) -> dict[str, dict]:
    """The files of these parts; the journal is removed."""
    path = folder / "journal"
    journal = transfer.Journal(path, "test")
    try:
        return transfer.make(folder, parts, journal, workers=2)
    finally:
        journal.close()
        path.unlink()
