"""The preflight's part at the start of every job: one exchange among all ranks and, on GPUs, how fast they talk."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from nemo_align.config.stages import WorkerConfig
from nemo_align.preflight import disk, files, links, node, versions
from nemo_align.preflight.checks import FAILED, WARNING, Check
from nemo_align.preflight.fit import check_fit
from nemo_align.runtime import device, launch_environment, watchdog
from nemo_align.runtime.agreement import gather
from nemo_align.runtime.folders import existing_folder
from nemo_align.runtime.launch_environment import LaunchEnvironment
from nemo_align.runtime.logs import LOGGER_NAME
from nemo_align.runtime.topology import Topology

logger = logging.getLogger(LOGGER_NAME)


def check_job(config: WorkerConfig, environment: LaunchEnvironment) -> list[str]:
    """Compare all nodes and look at files and room, once the ranks have met; returns where each rank runs.

    Raises:
        ValueError: on all ranks alike: nodes of different versions or with packages that cannot run, too few GPUs, data
            that only some nodes have.
    """
    seen = gather((watchdog.place(), here({config.experiment: config}, environment)))
    nodes = [entry for _, entry in seen]
    memory = node.smallest_memory(nodes)
    problems = [check for check in node.check_nodes(nodes, only_differences=True) if check.status == FAILED]
    if problems:
        raise ValueError("\n".join(f"{check.text}. {check.remedy}" for check in problems))
    if environment.rank == 0:
        _look_at_room(config)
        if memory is not None:
            _look_at_plan(config, environment, memory)
    return [place for place, _ in seen]


def look_at_links(topology: Topology) -> None:
    """Time every group of ranks, a few seconds, and log it; warn of a slow node and of links that NCCL does not use.

    Only warn: the job goes on at the pace of the slowest, and whoever reads may think that better than none.
    """
    if topology.world_size == 1:
        return
    rates = links.measure(topology, launch_environment.node_name())
    if topology.is_main:
        for check in links.judge(rates, device.accelerator_name()):
            if check.status in (WARNING, FAILED):
                logger.warning("links: %s%s", check.text, "" if check.remedy is None else f". Remedy: {check.remedy}")
            else:
                logger.info("links: %s", check.text)


def here(
    stages: Mapping[str, WorkerConfig],
    environment: LaunchEnvironment,
    written: Mapping[str, Sequence[Path]] | None = None,
) -> node.Node:
    """What this rank sees of its node. `written`: by earlier stages of a recipe, as `files.missing` takes it."""
    found, gpus = _versions(), torch.cuda.device_count() if device.use_gpu() else 0
    first = environment.local_rank == 0
    return node.Node(
        name=launch_environment.node_name(),
        versions=found,
        gpus=gpus,
        ranks=environment.local_world_size,
        memory=device.total_memory(),
        missing=files.missing(stages, written) if first else [],
        wrong=list(_wrong(found, gpus)) if first else [],
    )


def _wrong(found: dict[str, str], gpus: int) -> Iterator[Check]:
    """What this node cannot run with."""
    checks = (*versions.check_versions(found, gpus=gpus), versions.check_apex())
    yield from (check for check in checks if check.status == FAILED)
    loaded, there = versions.loaded_driver()
    # Without CUDA torch is meant for the CPU; an empty variable says the same.
    if there and not gpus and "CUDA" in found and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        yield Check(
            name="driver",
            status=FAILED,
            text=f"{there} GPUs are there, but torch for CUDA {found['CUDA']} sees none through driver {loaded}",
            remedy="a newer driver, or torch for an older CUDA; nvidia-smi says more. To run on the CPU: "
            "CUDA_VISIBLE_DEVICES=",
        )


def _versions() -> dict[str, str]:
    """As installed, with NCCL's version as torch loads it."""
    found = versions.installed()
    if device.use_gpu():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _look_at_plan(config: WorkerConfig, environment: LaunchEnvironment, memory: int) -> None:
    """Warn of a stage that the plan says will not fit. Only that: the plan errs on the safe side, by a tenth where
    published runs can tell (docs/plan.md), and a run that ends for want of memory ends in its first steps."""
    check = check_fit(config.experiment, config, memory, environment.world_size)
    if check.status in (WARNING, FAILED):
        logger.warning("%s. Nearest changes: %s", check.text, check.remedy)


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
