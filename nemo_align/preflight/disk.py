"""Room for a run's checkpoints and the speed at which they are written. Imports no torch."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_align.config import build
from nemo_align.config.stages import RewardStageConfig, TrainStageConfig, WorkerConfig
from nemo_align.dry_run import checkpoints
from nemo_align.dry_run.findings import number_of_bytes
from nemo_align.preflight.checks import FAILED, NOTE, OK, WARNING, Check
from nemo_align.runtime import signal_lead
from nemo_align.runtime.folders import existing_folder

PROBE_BYTES = 256 * 2**20  # per node: a second or less on what a checkpoint should be written to
_BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Disk:
    """What one node sees of the file system of the run directory."""

    folder: str
    free_bytes: int
    written_bytes: int
    seconds: float  # to write and sync them; all nodes at once
    problem: str | None = None


def bytes_of_checkpoint(config: WorkerConfig) -> int | None:
    """Of one with optimizer state; None where nothing is saved, or the model is that of a checkpoint not read yet."""
    if not isinstance(config, TrainStageConfig) or build.missing_keys(config.model):
        return None
    return checkpoints.bytes_of_checkpoint(config, config.reward if isinstance(config, RewardStageConfig) else None)


def look(run_dir: str | Path, label: str, num_bytes: int = PROBE_BYTES) -> Disk:
    """Free space, and the time that a file of `num_bytes` takes; the file is removed. `label`: of this node."""
    folder = existing_folder(run_dir)
    free = shutil.disk_usage(folder).free
    path = folder / f".nemo_align_doctor_{label}_{os.getpid()}"
    block = os.urandom(_BLOCK_BYTES)  # zeros would be compressed away on some file systems
    written, begin = 0, time.perf_counter()
    try:
        try:
            with open(path, "wb") as stream:
                while written < min(num_bytes, free // 2):
                    written += stream.write(block)
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        return Disk(str(folder), free, 0, 0.0, error.strerror)
    return Disk(str(folder), free, written, time.perf_counter() - begin)


def check_disk(
    disks: Mapping[str, Disk], config: WorkerConfig | None, lead: int = signal_lead.DEFAULT_SECONDS
) -> Check:
    """The nodes' findings against the checkpoints of a run. The rate is that of all nodes writing at the same time.

    `lead`: seconds that a job has between the signal and its time limit.
    """
    broken = {node: disk for node, disk in disks.items() if disk.problem is not None}
    if broken:
        node, disk = next(iter(broken.items()))
        named = ", ".join(broken)
        return Check(
            name="disk",
            status=FAILED,
            text=f"{disk.folder} cannot be written on {named}: {disk.problem}",
            remedy=f"mend the mount on {node}, or set run_dir to a folder that all nodes can write",
        )
    free = min(disk.free_bytes for disk in disks.values())
    rate = sum(disk.written_bytes for disk in disks.values()) / max(max(d.seconds for d in disks.values()), 1e-9)
    first = next(iter(disks.values()))
    found = f"{number_of_bytes(free)} free, {number_of_bytes(rate)}/s written by {len(disks)} node"
    text = f"{first.folder}: {found}{'s' * (len(disks) > 1)}"
    size = None if config is None else bytes_of_checkpoint(config)
    if size is None:
        return Check(name="disk", status=OK, text=text)
    assert isinstance(config, TrainStageConfig)
    seconds = size / max(rate, 1.0)
    text += f"; a checkpoint has {number_of_bytes(size)}: {seconds:.0f} s"
    if free < size:
        return Check(name="disk", status=FAILED, text=text, remedy="make room, or set run_dir to a larger file system")
    # One is written before the oldest is deleted; the final one stays beside the periodic ones.
    kept = config.checkpoint.keep_last + 2 if config.checkpoint.save_every else 1
    if free < kept * size:
        remedy = f"room for {kept} checkpoints, or a lower checkpoint.keep_last"
        return Check(name="disk", status=WARNING, text=f"{text}, and {kept} of them lie there at once", remedy=remedy)
    needed = signal_lead.needed_seconds(0.0, seconds, asynchronous=config.checkpoint.asynchronous)
    if needed > lead:
        text += f", more than the {lead} s between the signal and the time limit hold"
        remedy = f"cluster.signal_lead_seconds={needed} or more, or a faster file system"
        remedy += "; more nodes write faster than one: ask them (slurm/train.sbatch doctor)" if len(disks) == 1 else ""
        return Check(name="disk", status=WARNING, text=text, remedy=remedy)
    return Check(name="disk", status=OK, text=text)


def check_shared(seen: Mapping[str, bool]) -> Check:
    """Whether all nodes see a file that rank 0 wrote into the run directory's file system."""
    blind = [node for node, sees in seen.items() if not sees]
    if blind:
        return Check(
            name="disk",
            status=FAILED,
            text=f"{', '.join(blind)} does not see what rank 0 writes",
            remedy="run_dir must lie on a file system that all nodes share",
        )
    status = OK if len(seen) > 1 else NOTE
    return Check(name="disk", status=status, text=f"{len(seen)} node{'s' * (len(seen) > 1)} see the same files")
