"""`nemo-align doctor`: all checks, and their report.

On a login node, or for a layout that this machine cannot hold, without torch and without workers. Otherwise on the
ranks of a job: those of srun or torchrun, or workers that the command starts, one per GPU.

    python -m nemo_align.preflight.doctor [arguments]        one rank
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_align.config.doctor import stage_of
from nemo_align.config.errors import ConfigError
from nemo_align.config.job_size import nodes_of_stages
from nemo_align.config.runtime import ParallelConfig, RuntimeConfig
from nemo_align.config.validation import check_data_parallel, check_world_size
from nemo_align.preflight import disk, files, node, versions
from nemo_align.preflight.checks import FAILED, NOTE, OK, WARNING, Check, exit_code, report
from nemo_align.preflight.fit import check_fit
from nemo_align.runtime import launch_environment, local_launch, signal_lead
from nemo_align.runtime.folders import existing_folder
from nemo_align.runtime.launch_environment import LaunchEnvironment

_MOST_CPU_WORKERS = 16
_TIMEOUT_MINUTES = 5.0  # of a collective: a link that hangs is found, not waited for


def main(arguments: Sequence[str], environment: LaunchEnvironment | None) -> int:
    """Print the report; returns SUCCESS, or USER_ERROR if a check failed. `environment`: of this rank of a job."""
    looked = _configuration(arguments)
    if environment is not None:
        return _on_ranks(looked, environment)
    gpus = local_launch.number_of_gpus()
    workers = _num_workers(_largest(looked.stages), gpus)
    if workers > 1:
        with tempfile.TemporaryDirectory(prefix="nemo_align_doctor_") as logs:
            argv = [sys.executable, "-m", "nemo_align.preflight.doctor", *arguments]
            return local_launch.launch(argv, workers, logs)
    found, driver = versions.installed(), versions.driver()
    here = node.Node(
        name=launch_environment.node_name(),
        versions=found,
        gpus=gpus,
        ranks=1,
        memory=None if driver is None else driver.memory,
        missing=files.missing(looked.stages, looked.written),
    )
    checks = [
        *looked.checks,
        *versions.check_versions(found, gpus=gpus),
        versions.check_driver(found, driver),
        versions.check_apex(),
        *node.check_nodes([here]),
        *_plans(looked.stages, here.memory),
        disk.check_disk({here.name: disk.look(looked.run_dir, here.name)}, looked.stages, signal_lead.configured()),
        _slurm(),
        Check(
            name="links", status=NOTE, text="to be timed on the nodes: sbatch --nodes=<n> slurm/train.sbatch doctor ..."
        ),
    ]
    print(report(checks), flush=True)
    return exit_code(checks)


@dataclass(frozen=True, kw_only=True)
class _Looked:
    """What the machines are looked at for."""

    checks: list[Check]  # whether its configuration is valid
    stages: dict[str, Any] = field(default_factory=dict)  # configurations, by name
    run_dir: str = "."
    written: dict[str, list[Path]] | None = None  # of a recipe: folders that each stage finds written by earlier ones


def _configuration(arguments: Sequence[str]) -> _Looked:
    try:
        verb, config = stage_of(arguments)
        if verb is None:
            none = Check(name="configuration", status=NOTE, text="none given (+experiment=<recipe>/<stage>)")
            return _Looked(checks=[none])
        if verb == "pipeline":
            return _recipe(config)
        valid = Check(name="configuration", status=OK, text=f"{config.experiment} ({verb})")
        return _Looked(checks=[valid], stages={config.experiment: config}, run_dir=config.run_dir)
    except ConfigError as error:
        remedy = "as the message says; nemo-align <verb> --help lists the keys"
        return _Looked(checks=[Check(name="configuration", status=FAILED, text=str(error), remedy=remedy)])


def _recipe(config: Any) -> _Looked:
    """All stages, each with the size of its job where a cluster gives that."""
    from nemo_align.pipeline.chain import build_chain, compose_chain
    from nemo_align.pipeline.resume import is_complete

    chain = build_chain(config)
    configs = compose_chain(chain, {stage.name for stage in chain if is_complete(stage)}, check_files=False)
    if config.cluster.kind == "slurm":
        sizes = nodes_of_stages(config.cluster, {name: stage.parallel for name, stage in configs.items()})
        for name, stage in configs.items():
            stage.gpus = math.prod(sizes[name])
    folders = {stage.name: stage.run_dir for stage in chain}
    text = (
        f"{config.experiment}: {len(chain)} stages; links in the layout of the largest, {_largest(configs).experiment}"
    )
    return _Looked(
        checks=[Check(name="configuration", status=OK, text=text)],
        stages=configs,
        run_dir=config.run_dir,
        written={stage.name: [folders[name] for name in stage.depends_on] for stage in chain},
    )


def _largest(stages: Mapping[str, Any]) -> Any:
    """The stage that needs most ranks; None without stages."""
    return max(stages.values(), key=lambda stage: _ranks_needed(stage.parallel), default=None)


def _plans(stages: Mapping[str, Any], memory: int | None, started: int | None = None) -> list[Check]:
    """A line for each stage, on GPUs of `memory` bytes."""
    return [check_fit(name, config, memory, started) for name, config in stages.items()]


def _ranks_needed(parallel: ParallelConfig) -> int:
    return parallel.tensor * parallel.pipeline * (parallel.data or 1)


def _num_workers(config: Any, gpus: int) -> int:
    """Ranks to start on this machine: one per GPU; without a GPU those of a small layout, else none."""
    if gpus:
        return gpus
    needed = 1 if config is None else _ranks_needed(config.parallel)
    return needed if needed <= _MOST_CPU_WORKERS else 1


def _slurm() -> Check:
    if shutil.which("sbatch") is None:
        return Check(name="SLURM", status=NOTE, text="sbatch is not installed here")
    done = subprocess.run(["sinfo", "--noheader", "--format=%D"], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or "no answer").splitlines()[0]
        text, remedy = f"its controller does not answer: {said}", "start jobs on a login node of the cluster"
        return Check(name="SLURM", status=WARNING, text=text, remedy=remedy)
    return Check(name="SLURM", status=OK, text=f"{sum(map(int, done.stdout.split()))} nodes")


def _on_ranks(looked: _Looked, environment: LaunchEnvironment) -> int:
    """The checks of all nodes and of the links between them; rank 0 prints, all return the same code."""
    from nemo_align.preflight import links
    from nemo_align.preflight.start import here
    from nemo_align.runtime import device, logs, topology
    from nemo_align.runtime.agreement import gather, on_main

    logs.quiet_libraries()
    device.install()
    parallel, layout = _layout(_largest(looked.stages), environment)
    grid = topology.initialize(parallel, RuntimeConfig(distributed_timeout_minutes=_TIMEOUT_MINUTES), environment)
    driver = versions.driver() if environment.local_rank == 0 else None
    mine = here(looked.stages, environment, looked.written)
    mine.versions.update({"driver": driver.version} if driver else {})
    disks = gather((mine.name, disk.look(looked.run_dir, str(grid.rank))) if environment.local_rank == 0 else None)
    sees = _sees_the_same_files(looked.run_dir, grid.rank)
    rates = links.measure(grid, mine.name)
    everyone = gather((environment.local_rank, mine, sees))
    accelerator = device.accelerator_name()

    def judge() -> int:
        leaders = [entry for local_rank, entry, _ in everyone if local_rank == 0]
        found = {name: version for name, version in mine.versions.items() if name != "driver"}
        own = (
            *versions.check_versions(found, gpus=mine.gpus),
            versions.check_apex(),
        )
        checks = [
            *looked.checks,
            *(check for check in own if check.status != FAILED),  # the others come from every node, named
            versions.check_driver(found, driver, works=mine.gpus > 0),
            *node.check_nodes(leaders),
            disk.check_disk(
                dict(entry for entry in disks if entry is not None), looked.stages, signal_lead.configured()
            ),
            disk.check_shared({f"{entry.name}": saw for local_rank, entry, saw in everyone if local_rank == 0}),
            *_plans(looked.stages, node.smallest_memory([entry for _, entry, _ in everyone]), environment.world_size),
            *layout,
            *links.judge(rates, accelerator),
        ]
        print(report(checks), flush=True)
        return exit_code(checks)

    code = on_main(grid, judge)
    topology.destroy()
    return code


def _layout(config: Any, environment: LaunchEnvironment) -> tuple[ParallelConfig, list[Check]]:
    """The configuration's layout if these ranks form it; else tensor groups within nodes, data groups across."""
    plain = ParallelConfig(tensor=environment.local_world_size)
    if environment.world_size % environment.local_world_size:
        plain = ParallelConfig()
    if config is None:
        return plain, []
    try:
        data = check_world_size(config.parallel, environment.world_size)
        check_data_parallel(config, data)
    except ConfigError as error:
        text = f"{error}\nTimed instead: groups within a node and across nodes"
        return plain, [
            Check(name="links", status=WARNING, text=text, remedy="start as many ranks as the job will have")
        ]
    return config.parallel, []


def _sees_the_same_files(run_dir: str, rank: int) -> bool:
    """Whether a file that rank 0 writes beside the run is there for this rank too. A collective."""
    import torch.distributed as dist

    paths: list[Any] = [None]
    if rank == 0:
        folder = existing_folder(run_dir)
        try:
            with tempfile.NamedTemporaryFile(prefix=".nemo_align_doctor_", dir=folder, delete=False) as file:
                paths = [file.name]
        except OSError:  # said by the disk check
            pass
    dist.broadcast_object_list(paths, src=0)
    seen = paths[0] is None or Path(paths[0]).exists()
    dist.barrier()
    if rank == 0 and paths[0] is not None:
        Path(paths[0]).unlink()
    return seen


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], launch_environment.detect()))
