"""The process grid: which rank holds which part of the model and of the data.

All groups come from one array of ranks, tensor parallelism varying fastest, then data, then pipeline (Megatron's order
"tp-cp-ep-dp-pp"). Twelve processes with tensor=2, pipeline=2, data=3:

    pipeline 0 (first layers)            pipeline 1 (last layers)
              tensor 0  tensor 1                   tensor 0  tensor 1
    data 0        0         1            data 0        6         7
    data 1        2         3            data 1        8         9
    data 2        4         5            data 2       10        11

A row is a tensor group {2, 3}: it splits each layer, talks in every layer, and so sits on neighbouring GPUs. A column
is a data group {0, 2, 4}: it sums gradients once per step. The same cell on both sides is a pipeline group {2, 8}: it
hands activations on. rank = tensor_rank + tensor * (data_rank + data * pipeline_rank).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nemo_align.config.runtime import ParallelConfig, RuntimeConfig
from nemo_align.runtime import device, seeds
from nemo_align.runtime.launch_environment import LaunchEnvironment


@dataclass(frozen=True)
class Topology:
    """Sizes of the grid and this process' place in it."""

    world_size: int
    rank: int
    tensor: int
    pipeline: int
    virtual_pipeline: int  # model chunks per pipeline rank
    data: int
    sequence: bool  # sequence parallel, in effect only when tensor > 1
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for the run (rank 0)."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer, hence the loss."""
        return self.pipeline_rank == self.pipeline - 1

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        from megatron.core import parallel_state

        return parallel_state.get_tensor_model_parallel_group()

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        from megatron.core import parallel_state

        return parallel_state.get_pipeline_model_parallel_group()

    @property
    def data_group(self) -> dist.ProcessGroup:
        from megatron.core import parallel_state

        return parallel_state.get_data_parallel_group()

    def layout(self) -> dict[str, int | bool]:
        """The grid as plain values, for manifests and reports."""
        return {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "virtual_pipeline": self.virtual_pipeline,
            "data": self.data,
            "sequence": self.sequence,
            "world_size": self.world_size,
        }


def initialize(parallel: ParallelConfig, runtime: RuntimeConfig, environment: LaunchEnvironment) -> Topology:
    """Join the other ranks, split them into the groups of the grid, and seed the generators.

    Every rank calls it with the same configuration. After `shutdown_model_parallel()` it may be called again, with
    another grid on the same processes.

    Raises:
        ValueError: the grid does not fit the number of processes, or a process has no GPU.
    """
    data = data_parallel_size(parallel, environment.world_size)
    join(runtime, environment)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        distributed_timeout_minutes=runtime.distributed_timeout_minutes,
    )
    topology = _place(parallel, environment.rank, environment.world_size, data, device.device())
    seeds.seed_everything(runtime.seed, topology)
    return topology


@contextmanager
def pretended_rank(parallel: ParallelConfig, *, rank: int, world_size: int) -> Iterator[Topology]:
    """Inside, this process is rank `rank` of a job of `world_size` processes that does not run: its groups are there
    and communicate with nobody. Nothing else may have joined a job in this process; afterwards nothing has.

    Raises:
        ValueError: the grid does not fit the number of processes.
    """
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    data = data_parallel_size(parallel, world_size)
    assert not dist.is_initialized(), "this process is a rank of a real job"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            create_gloo_process_groups=False,
        )
        yield _place(parallel, rank, world_size, data, torch.device("cpu"))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _place(parallel: ParallelConfig, rank: int, world_size: int, data: int, here: torch.device) -> Topology:
    """The place of `rank` in Megatron-core's groups, which have just been made."""
    from megatron.core import parallel_state

    topology = Topology(
        world_size=world_size,
        rank=rank,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        data=data,
        sequence=parallel.sequence and parallel.tensor > 1,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        device=here,
    )
    column = topology.data_rank + data * topology.pipeline_rank
    assert topology.rank == topology.tensor_rank + parallel.tensor * column, "not the order of the picture above"
    return topology


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """What the processes leave for data parallelism once tensor and pipeline have theirs.

    Raises:
        ValueError: the sizes do not multiply to `world_size`.
    """
    model = parallel.tensor * parallel.pipeline
    data = world_size // model if parallel.data is None else parallel.data
    if data < 1 or model * data != world_size:
        product = f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}"
        if parallel.data is not None:
            product += f" x parallel.data={parallel.data}"
            wanted = f"is {model * parallel.data}, but {world_size} processes were started"
        else:
            wanted = f"is {model}, which does not divide the {world_size} processes that were started"
        raise ValueError(f"{product} {wanted}. Change the layout, or the number of tasks.")
    return data


def join(runtime: RuntimeConfig, environment: LaunchEnvironment) -> None:
    """Choose device and threads and meet the other ranks in torch's default process group, unless done before."""
    if dist.is_initialized():
        return
    here = device.select(environment.local_rank)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    elif not device.use_gpu() and "OMP_NUM_THREADS" not in os.environ:  # torch has read it
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // environment.local_world_size))
    if environment.source == "local":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo asks for the host's name, which may not resolve
    torch.use_deterministic_algorithms(runtime.deterministic)
    if environment.world_size == 1 and not environment.init_method:
        meeting = {"store": dist.HashStore()}  # nobody to meet: no port, no file
    else:
        meeting = {"init_method": environment.init_method}
    dist.init_process_group(
        backend=device.backend(),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=datetime.timedelta(minutes=runtime.distributed_timeout_minutes),
        device_id=here if device.use_gpu() else None,
        **meeting,
    )


def shutdown_model_parallel() -> None:
    """Take the grid apart and keep the processes together: `initialize` may follow with another grid.

    A collective: gloo may still be sending for a slower rank, so nobody leaves before everybody has arrived.
    """
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        return
    dist.barrier()
    groups = parallel_state._global_process_group_list or []  # Megatron forgets its groups without destroying them
    parallel_state.destroy_model_parallel()
    for group in groups:
        # None stands for the default group; those that destroy_model_parallel() did destroy are no longer known.
        if group is not None and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def destroy() -> None:
    """Leave all groups, the default one too."""
    shutdown_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
