"""Room for a run's checkpoints and the speed at which they are written. Imports no torch."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nemo_align.checkpoint.store import CHECKPOINTS
from nemo_align.config import build
from nemo_align.config.plan import PlannedStage
from nemo_align.config.stages import RewardStageConfig, TrainStageConfig, WorkerConfig
from nemo_align.dry_run import checkpoints
from nemo_align.dry_run.findings import number_of_bytes
from nemo_align.model.counts import count_parameters
from nemo_align.planning.workload import stage_length
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


@dataclass(frozen=True)
class Need:
    """What a stage, or the stages of a recipe one after the other, write."""

    count: int  # checkpoints that stay, of all stages
    num_bytes: float  # of these, and of exports for Hugging Face; less what lies there already
    fewest_bytes: float  # the same with checkpoint.keep_last=1
    largest: int  # checkpoint
    asynchronous: bool  # its saves


def need_of(stages: Mapping[str, WorkerConfig]) -> Need | None:
    """Of all stages whose size is known; None if there is none. No stage ever has more than it leaves behind."""
    count, most, fewest, largest = 0, 0.0, 0.0, (0, False)
    for config in stages.values():
        size = bytes_of_checkpoint(config)
        if size is None:
            continue
        assert isinstance(config, TrainStageConfig)
        kept, exported = _kept(config), _exported_bytes(config)
        there = _bytes_below(Path(config.run_dir) / CHECKPOINTS)
        count += kept
        most += max(0, kept * size + exported - there)
        fewest += max(0, min(kept, 2) * size + exported - there)
        largest = max(largest, (size, config.checkpoint.asynchronous))
    return Need(count, most, fewest, *largest) if count else None


def _kept(config: TrainStageConfig) -> int:
    steps = [batches.steps for batches in stage_length(PlannedStage(stage=config)).batches]
    return checkpoints.most_kept(config, None if None in steps else sum(filter(None, steps)))


def _exported_bytes(config: TrainStageConfig) -> int:
    if not config.checkpoint.export_hf:
        return 0
    return count_parameters(config.model).total * (2 if config.precision.dtype == "bf16" else 4)


def _bytes_below(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # a run that goes on deletes its oldest
            found += path.stat().st_size if path.is_file() else 0
    return found


def check_disk(
    disks: Mapping[str, Disk], stages: Mapping[str, WorkerConfig], lead: int = signal_lead.DEFAULT_SECONDS
) -> Check:
    """The nodes' findings against the checkpoints of the stages. The rate is that of all nodes writing at once.

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
    folder = next(iter(disks.values())).folder
    found = f"{number_of_bytes(free)} free"
    speed = f"{number_of_bytes(rate)}/s written by {len(disks)} node{'s' * (len(disks) > 1)}"
    need = need_of(stages)
    if need is None:
        return Check(name="disk", status=OK, text=f"{folder}: {found}, {speed}")
    seconds = need.largest / max(rate, 1.0)
    largest = "a checkpoint has" if len(stages) == 1 else "the largest checkpoint has"
    of_stages = f" of {len(stages)} stages" if len(stages) > 1 else ""
    what = f"{need.count} checkpoints{of_stages} stay" if need.count > 1 else f"one checkpoint{of_stages} stays"
    text = (
        f"{folder}: needs {number_of_bytes(need.num_bytes)}, {found}: {what}; {largest} "
        f"{number_of_bytes(need.largest)}: {seconds:.0f} s, {speed}"
    )
    if free < need.num_bytes:
        return Check(name="disk", status=FAILED, text=text, remedy=_room(need, of_recipe=len(stages) > 1))
    needed = signal_lead.needed_seconds(0.0, seconds, asynchronous=need.asynchronous)
    if needed > lead:
        text += f", more than the {lead} s between the signal and the time limit hold"
        remedy = f"cluster.signal_lead_seconds={needed} or more, or a faster file system"
        remedy += "; more nodes write faster than one: ask them (slurm/train.sbatch doctor)" if len(disks) == 1 else ""
        return Check(name="disk", status=WARNING, text=text, remedy=remedy)
    return Check(name="disk", status=OK, text=text)


def _room(need: Need, *, of_recipe: bool) -> str:
    remedy = "run_dir=<folder on a larger file system>"
    if need.fewest_bytes < need.num_bytes:
        where = " in every stage that trains (its experiment, or its stages.<name>.overrides)" if of_recipe else ""
        remedy += f", or checkpoint.keep_last=1{where}, which needs {number_of_bytes(need.fewest_bytes)}"
    return remedy


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
