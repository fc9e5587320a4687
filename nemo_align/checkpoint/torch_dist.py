"""Reading Megatron-core's torch_dist format inside a process group, over both ends of megatron-core.

The seams of the versions, all here: 0.16 keeps what is not a tensor in `common.pt` and takes a strategy for it, 0.19
keeps it as the byte entry `common_state` and reads both. Both would write through forked writer processes and a spawned
manager: `snapshot` writes the same files without.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed import distributed_c10d as c10d
from torch.distributed.checkpoint.api import CheckpointException

from nemo_align.checkpoint.safe_reading import read_metadata, restricted_reading
from nemo_align.checkpoint.streaming.torch_dist import COMMON_FILE
from nemo_align.config.errors import raised_by_this_package

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


def load_sharded(state: dict, folder: Path) -> dict:
    """Fill a sharded state dict from `folder`; returns it with tensors and objects in place of shards. Collective.

    Raises:
        ValueError: a file that cannot be read or names what no checkpoint needs.
    """
    try:
        with restricted_reading():
            return dist_checkpointing.load(state, str(folder), **_LOAD_OPTIONS)
    except (CheckpointException, Exception) as error:  # damaged or malicious bytes can raise anything
        if not _is_of_the_files(error):
            raise
        raise ValueError(f"checkpoint {folder} is refused: {_reason(error)}") from error


def _is_of_the_files(error: BaseException) -> bool:
    """Not what is in words for the user already, a device without memory, or the loss of another rank."""
    if isinstance(error, ValueError) and raised_by_this_package(error):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    in_a_collective = trace is not None and trace.tb_frame.f_globals.get("__name__") == c10d.__name__
    return not in_a_collective and not isinstance(error, torch.OutOfMemoryError)


def _reason(error: BaseException) -> str:
    """One line: torch's own exception (not an Exception) carries one per rank, its pickle errors advise to trust."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_reason(cause)}"
    lines = str(error).splitlines()
    told = [line for line in lines if "WeightsUnpickler error" in line] or lines[:1]
    return f"{type(error).__name__}: {told[0].partition(' Please use')[0].strip()}" if told else type(error).__name__


def read_common(folder: Path) -> dict:
    """What a checkpoint holds besides tensors and per-rank objects, whichever megatron-core wrote it.

    Raises:
        ValueError: it is not there, cannot be read, or names what no checkpoint needs.
    """
    if (path := folder / COMMON_FILE).exists():
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged or malicious bytes can raise anything
            raise ValueError(f"{path} is refused: {_reason(error)}") from None
    key = ShardedObject(COMMON_KEY, None, (1,), (0,)).unique_key
    metadata = read_metadata(folder)
    entries = [info for index, info in metadata.storage_data.items() if index.fqn == key]
    if not entries:
        raise ValueError(f"{folder} has neither {COMMON_FILE} nor the entry {key}: the checkpoint is damaged")
    path = folder / entries[0].relative_path
    try:
        with open(path, "rb") as stream:
            stream.seek(entries[0].offset)
            content = io.BytesIO(stream.read(entries[0].length))
        return torch.load(content, map_location="cpu", weights_only=True)[0]
    except Exception as error:
        raise ValueError(f"{path} is refused at {key}: {_reason(error)}") from None
