"""How many GPUs a job has: one that is only looked at (dry run, plan, doctor), and a stage on a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nemo_align.config.errors import ConfigError
from nemo_align.config.pipeline import ClusterConfig
from nemo_align.config.runtime import ParallelConfig
from nemo_align.config.stages import WorkerConfig
from nemo_align.config.validation import check_data_parallel, check_world_size


def job_layout(config: WorkerConfig, started: int | None = None) -> ParallelConfig:
    """The layout of a job that is only looked at, its parallel.data a number: by a dry run, a plan or the doctor.

    The job's size is `gpus`; else `started`, the processes of the job that this one belongs to; else what the layout
    names, one replica where it leaves parallel.data open.

    Raises:
        ConfigError: so many do not form the layout, or cannot share the batches.
    """
    parallel = config.parallel
    size = config.gpus or started or parallel.tensor * parallel.pipeline * (parallel.data or 1)
    data = check_world_size(parallel, size, named=config.gpus is not None)
    check_data_parallel(config, data)
    return replace(parallel, data=data)


def check_started(config: WorkerConfig, started: int) -> None:
    """Refuse `gpus` of a command that starts on other GPUs: a run has the size that it is started with.

    Raises:
        ConfigError: with the ways to choose that.
    """
    if config.gpus not in (None, started):
        raise ConfigError(
            f"gpus={config.gpus}, but {started} processes are started: gpus is what dry_run=true, plan and doctor "
            "reckon with. A run takes what it is started on: parallel.data=<replicas> here, nodes and tasks of a job"
        )


def num_nodes(cluster: ClusterConfig, parallel: ParallelConfig) -> tuple[int, int]:
    """(nodes, tasks per node) of a stage with the layout `parallel`.

    Raises:
        ConfigError: the layout does not fill whole nodes.
    """
    per_node = cluster.tasks_per_node or cluster.gpus_per_node
    assert per_node is not None, "validated: one of both is given"
    cell = parallel.tensor * parallel.pipeline
    if parallel.data is None and cluster.nodes is not None:
        return cluster.nodes, per_node
    world_size = cell * (parallel.data or 1)
    if world_size <= per_node:
        return 1, world_size
    if world_size % per_node:
        raise ConfigError(
            f"parallel.tensor x pipeline x data = {world_size} workers do not fill nodes of {per_node}: choose "
            "parallel.data so that they do, or correct cluster."
            f"{'tasks' if cluster.tasks_per_node else 'gpus'}_per_node"
        )
    return world_size // per_node, per_node


def nodes_of_stages(cluster: ClusterConfig, layouts: Mapping[str, ParallelConfig]) -> dict[str, tuple[int, int]]:
    """`num_nodes` of every stage of a recipe.

    Raises:
        ConfigError: layouts that do not fill whole nodes, each with the stages that have it.
    """
    found, problems = {}, {}
    for name, parallel in layouts.items():
        try:
            found[name] = num_nodes(cluster, parallel)
        except ConfigError as error:
            problems[name] = [str(error)]
    if problems:
        raise ConfigError.of_stages(problems, len(layouts))
    return found
