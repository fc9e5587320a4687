"""Parameters counted from the real Megatron model: every pipeline rank built on the meta device, alone.

A fake process group stands in for the other ranks, so one process builds any rank of any job without memory. Imports
torch and Megatron-core; Transformer Engine's layers are used where there is a GPU, as in training.
"""

from __future__ import annotations

from dataclasses import replace

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

    from nemo_align.model.build import build_model
    from nemo_align.runtime.topology import pretended_rank

    # One replica: parameters do not depend on their number, and groups of thousands of ranks take seconds. Userbuffers
    # would have to exist before the layers, and change no parameter.
    world_size = parallel.tensor * parallel.pipeline
    if not device.use_gpu():  # FP8 changes no parameter, and its layers are a GPU's
        precision = PrecisionConfig(dtype=precision.dtype)
    alone = replace(parallel, data=1, overlap_tensor=False)
    rank = parallel.tensor * stage
    with pretended_rank(alone, rank=rank, world_size=world_size) as topology, torch.device("meta"):
        chunks = build_model(model, alone, precision, topology, reward_head=reward)
        return [sum(parameter.numel() for parameter in chunk.parameters()) for chunk in chunks]
