"""What a save holds at one step: planned with all ranks, copied to host memory, written by each rank on its own.

Planning, on the main thread, needs the other ranks: who writes which of the data-parallel replicas. That answer is kept
as long as the structure of the state stays the same, so that later saves exchange a few numbers only. Writing needs
nobody: each rank writes one file and takes its checksum on the way, and rank 0 puts `.metadata` together from what the
ranks say they wrote. So the writing may run beside the training steps.

The files are those of Megatron-core's `torch_dist` format. What is no tensor goes into `common.pt`, which every
supported megatron-core reads (0.19 would itself write it as a byte entry).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from nemo_align.checkpoint import checksums
from nemo_align.checkpoint.manifest import write_durably
from nemo_align.checkpoint.safe_reading import METADATA_FILE
from nemo_align.checkpoint.streaming.torch_dist import COMMON_FILE, CONFIG, CONFIG_FILE
from nemo_align.runtime.agreement import highest
from nemo_align.runtime.topology import Topology


class Cancelled(Exception):
    """Another rank's part of the save failed."""


@dataclass
class Written:
    """What one rank wrote."""

    plan: SavePlan
    places: dict[MetadataIndex, _StorageInfo]
    files: dict[str, dict]  # the manifest's entries


@dataclass
class Snapshot:
    """This rank's part of a save. Until `copy_to_host` it holds the live tensors."""

    rank: int
    plan: SavePlan
    items: deque[tuple[WriteItem, torch.Tensor | io.BytesIO]]
    common: bytes | None  # rank 0: what is no tensor
    num_bytes: int
    cancelled: threading.Event = field(default_factory=threading.Event)
    written_bytes: int = 0

    def copy_to_host(self) -> None:
        """Replace the live tensors by copies, so that training may go on."""
        for _ in range(len(self.items)):
            item, data = self.items.popleft()
            self.items.append((item, _host_copy(data) if isinstance(data, torch.Tensor) else data))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write(self, folder: Path) -> Written:
        """Write this rank's files, durably; frees what is written. Needs no other rank: any thread may call it.

        Raises:
            OSError: with the file's name. Cancelled: `cancelled` was set meanwhile.
        """
        places, files = {}, {}
        if self.items:
            name = f"__{self.rank}_0.distcp"
            with _CheckedFile(folder / name) as file:
                while self.items:
                    if self.cancelled.is_set():
                        raise Cancelled
                    item, data = self.items.popleft()
                    start = file.num_bytes
                    _write_item(data, file)
                    file.end_part()
                    places[item.index] = _StorageInfo(name, start, file.num_bytes - start)
                    self.written_bytes = file.num_bytes
                files[name] = file.entry()
        if self.common is not None:
            for name, content in ((COMMON_FILE, self.common), (CONFIG_FILE, json.dumps(CONFIG).encode())):
                files[name] = write_checked(folder / name, content)
        return Written(self.plan, places, files)


class SavePlanner:
    """Plans saves; remembers who writes what while the structure of the state stays the same."""

    def __init__(self) -> None:
        self._structures: dict[str, tuple[bytes, object]] = {}

    def plan(self, state: dict, content_metadata: dict, sharding: str | None, topology: Topology) -> Snapshot:
        """Plan the save of a sharded state dict. Collective. Data-parallel replicas share the writing."""
        state["content_metadata"] = content_metadata
        sharded, common = save_preprocess(state, validate_access_integrity=False)
        self._distribute(sharded, str(sharding), topology)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(by_key, False), None, topology.is_main)
        plan = planner.create_local_plan()
        items = deque((item, planner.resolve_data(item)) for item in plan.items)
        common_bytes = _pickled(common) if topology.is_main else None
        num_bytes = sum(_size(data) for _, data in items) + len(common_bytes or b"")
        return Snapshot(topology.rank, plan, items, common_bytes, num_bytes)

    def _distribute(self, sharded: dict, sharding: str, topology: Topology) -> None:
        structure = _structure(sharded)
        known, distribution = self._structures.get(sharding, (b"", None))
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if changed := highest(topology, [int(structure != known)])[0]:
            distribution = determine_main_replica_uniform_distribution(sharded, group)
            self._structures[sharding] = (structure, distribution)
        distribute_main_replicas_with_precomputed_distribution(sharded, group, distribution)
        if changed:  # every value is written exactly once
            validate_sharding_integrity(determine_global_metadata(sharded)[1])


def merged_metadata(parts: list[Written]) -> bytes:
    """The `.metadata` file of a checkpoint that these parts of all ranks make up."""
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    _, metadata = planner.create_global_plan([part.plan for part in parts])
    metadata.version = CURRENT_DCP_VERSION
    metadata.storage_data = {index: place for part in parts for index, place in part.places.items()}
    metadata.storage_meta = StorageMeta()
    return pickle.dumps(metadata)


def write_metadata(folder: Path, parts: list[Written]) -> dict[str, dict]:
    """Write `.metadata`; returns the manifest's entries of all files that the parts name, and of this one."""
    files = {name: entry for part in parts for name, entry in part.files.items()}
    files[METADATA_FILE] = write_checked(folder / METADATA_FILE, merged_metadata(parts))
    return files


def write_checked(path: Path, content: bytes) -> dict:
    """Write a file durably; returns its entry in the manifest."""
    write_durably(path, content)
    return checksums.entry(len(content), checksums.digest_of([content]))


class _CheckedFile:
    """A file that is only appended to, with a checksum of each part; forced to disk when it is closed without an error.

    A part is a tensor: whoever reads some tensors of a checkpoint alone can check those.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = checksums.new_hash()
        self._parts: list[list] = []
        self._error: OSError | None = None
        self.num_bytes = 0

    def __enter__(self) -> _CheckedFile:
        self._stream = open(self._path, "wb")
        return self

    def write(self, data) -> int:
        try:
            count = self._stream.write(data)
        except OSError as error:
            self._error = error
            raise
        self._digest.update(data)
        self.num_bytes += count
        return count

    def flush(self) -> None:
        """torch.save calls it after each tensor; the file is flushed once, at its end."""

    def end_part(self) -> None:
        """What is written next belongs to another part."""
        if self.num_bytes > (self._parts[-1][0] if self._parts else 0):
            self._parts.append([self.num_bytes, self._digest.hexdigest()])
            self._digest = checksums.new_hash()

    def entry(self) -> dict:
        self.end_part()
        return checksums.entry(self.num_bytes, self._parts or self._digest.hexdigest())

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            try:
                if error is None:
                    self._stream.flush()
                    os.fsync(self._stream.fileno())
            finally:
                self._stream.close()
        except OSError as failed:
            self._error = self._error or failed
        if self._error is not None:  # torch.save raises an error of its own about it
            raise OSError(self._error.errno, self._error.strerror, str(self._path)) from self._error


def _write_item(data: torch.Tensor | io.BytesIO, file: _CheckedFile) -> None:
    if isinstance(data, io.BytesIO):
        file.write(data.getbuffer())
        return
    tensor = data.detach().cpu()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:  # a view would drag its whole storage into the file
        tensor = tensor.clone()
    torch.save(tensor, file)


def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if not tensor.is_cuda:
        return tensor.clone()
    # Pinned memory takes the copy at the bus's full rate; torch keeps it for the next save.
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _size(data: torch.Tensor | io.BytesIO) -> int:
    return data.nbytes if isinstance(data, torch.Tensor) else data.getbuffer().nbytes


def _pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _structure(sharded: dict) -> bytes:
    """A hash of what this rank could write, without the values."""
    digest = hashlib.blake2b(digest_size=16)
    for value in nested_values(sharded):
        described = [value.key, value.global_shape, value.global_offset, value.replica_id]
        if isinstance(value, ShardedTensor):
            described += [value.local_shape, value.dtype]
        digest.update(repr(described).encode())
    return digest.digest()
