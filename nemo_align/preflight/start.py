"""The cheap part of the preflight, at the start of every job: one exchange among all ranks, nothing timed."""

from __future__ import annotations

import logging
import shutil

import torch

from nemo_align.config.stages import WorkerConfig
from nemo_align.preflight import disk, node, versions
from nemo_align.preflight.checks import FAILED
from nemo_align.runtime import device, launch_environment, watchdog
from nemo_align.runtime.agreement import gather
from nemo_align.runtime.folders import existing_folder
from nemo_align.runtime.launch_environment import LaunchEnvironment
from nemo_align.runtime.logs import LOGGER_NAME

logger = logging.getLogger(LOGGER_NAME)


def check_job(config: WorkerConfig, environment: LaunchEnvironment) -> list[str]:
    """Compare all nodes and look at files and room, once the ranks have met; returns where each rank runs.

    Raises:
        ValueError: on all ranks alike: nodes of different versions, too few GPUs, data that only some nodes have.
    """
    seen = gather((watchdog.place(), here(config, environment)))
    nodes = [entry for _, entry in seen]
    problems = [check for check in node.check_nodes(nodes, only_differences=True) if check.status == FAILED]
    if problems:
        raise ValueError("\n".join(f"{check.text}. {check.remedy}" for check in problems))
    if environment.rank == 0:
        _look_at_room(config)
    return [place for place, _ in seen]


def here(config: WorkerConfig | None, environment: LaunchEnvironment) -> node.Node:
    """What this rank sees of its node."""
    looks = config is not None and environment.local_rank == 0
    return node.Node(
        name=launch_environment.node_name(),
        versions=_versions(),
        gpus=torch.cuda.device_count() if device.use_gpu() else 0,
        ranks=environment.local_world_size,
        missing=node.missing_files(config) if looks else [],
    )


def _versions() -> dict[str, str]:
    """As installed, with NCCL's version as torch loads it."""
    found = versions.installed()
    if device.use_gpu():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _look_at_room(config: WorkerConfig) -> None:
    """Warn of a disk that the first checkpoint will not fit on. Only then: what is there may be about to be deleted."""
    needed = disk.bytes_of_checkpoint(config)
    if needed is not None:
        free = shutil.disk_usage(existing_folder(config.run_dir)).free
        if free < needed:
            logger.warning(
                "run_dir=%s has room for %.3g GB and a checkpoint needs %.3g GB: make room before the first save, or "
                "the run ends there",
                config.run_dir,
                free / 1e9,
                needed / 1e9,
            )
