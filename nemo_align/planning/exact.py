"""Parameters counted from the real Megatron model: every pipeline rank built on the meta device, alone.

A fake process group stands in for the other ranks, so one process builds any rank of any job without memory. Imports
torch and Megatron-core; Transformer Engine's layers are used where there is a GPU, as in training.
"""

from __future__ import annotations

from nemo_align.config.model import ModelConfig
from nemo_align.config.objectives import RewardConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig


def count_parameters_exactly(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, reward: RewardConfig | None = None
) -> list[list[int]]:
    """Parameters of each chunk of each pipeline stage, on tensor rank 0. `reward`: of a reward model.

    Raises:
        ValueError: a layout or precision that the machine cannot build.
    """
    return [_stage(model, parallel, precision, reward, stage) for stage in range(parallel.pipeline)]


def _stage(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, reward: RewardConfig | None, stage: int
) -> list[int]:
    from nemo_align.runtime import device

    device.install()
    import torch
    from megatron.core import parallel_state
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from nemo_align.model.build import build_model
    from nemo_align.runtime.topology import Topology

    assert parallel.data is not None
    # One replica: parameters do not depend on their number, and groups of thousands of ranks take seconds.
    world_size = parallel.tensor * parallel.pipeline
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    distributed.init_process_group("fake", store=FakeStore(), rank=parallel.tensor * stage, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            parallel.tensor, parallel.pipeline, virtual, create_gloo_process_groups=False
        )
        topology = Topology(
            world_size=world_size,
            rank=parallel.tensor * stage,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual_pipeline=parallel.virtual_pipeline,
            data=1,
            sequence=parallel.sequence and parallel.tensor > 1,
            tensor_rank=0,
            pipeline_rank=stage,
            data_rank=0,
            device=torch.device("cpu"),
        )
        with torch.device("meta"):
            chunks = build_model(model, parallel, precision, topology, reward_head=reward)
        return [sum(parameter.numel() for parameter in chunk.parameters()) for chunk in chunks]
    finally:
        parallel_state.destroy_model_parallel()
        distributed.destroy_process_group()
