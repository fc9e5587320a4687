"""Writing and reading Megatron-core's torch_dist format inside a process group, over both ends of megatron-core.

The seams of the versions, all here: 0.16 keeps what is not a tensor in `common.pt` and takes a strategy for it, 0.19
keeps it as the byte entry `common_state` and reads both. Both write through forked writer processes and a spawned
manager; we write with torch's own synchronous writer, which needs neither, reports a full disk on every rank, and puts
the same files down.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException

from nemo_align.checkpoint.safe_reading import read_metadata, restricted_reading

COMMON_FILE = "common.pt"
COMMON_KEY = "common_state"  # 0.19's entry for what is not a tensor

try:  # megatron-core below 0.17: a load takes the strategy that reads common.pt
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
except ImportError:
    _LOAD_OPTIONS: dict = {}
else:

    class _CommonOfEitherVersion(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str | Path) -> dict:
            return read_common(Path(checkpoint_dir))

    _LOAD_OPTIONS = {"common_strategy": _CommonOfEitherVersion()}


class _SynchronousSave(TorchDistSaveShardedStrategy):
    """Megatron's plan of what each rank writes, torch's plain writer."""

    def save(self, sharded_state_dict: dict, checkpoint_dir: str | Path) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        dcp.save(
            mcore_to_pyt_state_dict(by_key, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, single_file_per_rank=True, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_sharded(state: dict, folder: Path, content_metadata: dict) -> None:
    """Write a sharded state dict into an empty folder. Collective. Data-parallel replicas share the writing."""
    strategy = _SynchronousSave("torch_dist", 1)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, group)
    try:
        dist_checkpointing.save(state, str(folder), strategy, content_metadata=content_metadata)
    except CheckpointException as error:
        raise OSError(f"the checkpoint could not be written to {folder}: {_reason(error)}") from error


def load_sharded(state: dict, folder: Path) -> dict:
    """Fill a sharded state dict from `folder`; returns it with tensors and objects in place of shards. Collective.

    Raises:
        ValueError: a file that cannot be read or names what no checkpoint needs.
    """
    try:
        with restricted_reading():
            return dist_checkpointing.load(state, str(folder), **_LOAD_OPTIONS)
    except (CheckpointException, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint {folder} is refused: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """One line: torch's own exception (not an Exception) carries one per rank, its pickle errors advise to trust."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_reason(cause)}"
    lines = str(error).splitlines()
    told = [line for line in lines if "WeightsUnpickler error" in line] or lines[:1]
    return f"{type(error).__name__}: {told[0].partition(' Please use')[0].strip()}" if told else type(error).__name__


def read_common(folder: Path) -> dict:
    """What a checkpoint holds besides tensors and per-rank objects, whichever megatron-core wrote it."""
    if (folder / COMMON_FILE).exists():
        return torch.load(folder / COMMON_FILE, map_location="cpu", weights_only=True)
    key = ShardedObject(COMMON_KEY, None, (1,), (0,)).unique_key
    metadata = read_metadata(folder)
    entries = [info for index, info in metadata.storage_data.items() if index.fqn == key]
    if not entries:
        raise ValueError(f"{folder} has neither {COMMON_FILE} nor the entry {key}: the checkpoint is damaged")
    with open(os.path.join(folder, entries[0].relative_path), "rb") as stream:
        stream.seek(entries[0].offset)
        return torch.load(io.BytesIO(stream.read(entries[0].length)), map_location="cpu", weights_only=True)[0]
