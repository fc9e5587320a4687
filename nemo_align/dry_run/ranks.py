"""Single ranks of the real job, built by the real code on the meta device, and the memory that their state takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nemo_align.config.errors import ConfigError, raised_by_this_package
from nemo_align.config.model import ModelConfig
from nemo_align.config.objectives import RewardConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.dry_run.findings import Findings, Section, number_of_bytes

# What a rank's weights, gradients and optimizer state are held against: no activation would fit beside more.
GPU_BYTES = 80e9


@dataclass(frozen=True, kw_only=True)
class BuiltRank:
    """What a rank holds."""

    rank: int
    place: str  # its coordinates in the grid
    layers: tuple[int, ...]  # numbers of its layers, 1 = first, in the order of its chunks
    num_chunks: int
    ends: tuple[str, ...]  # embedding, output layer or reward head, where it has them
    model_parameters: int  # in precision.dtype
    fp32_parameters: int  # the reward head's

    @property
    def parameters(self) -> int:
        return self.model_parameters + self.fp32_parameters


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes of a rank's state that does not depend on the batch."""

    weights: int
    gradients: int
    optimizer: int  # of one data-parallel rank

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def chosen_ranks(asked: Sequence[int] | None, parallel: ParallelConfig) -> list[int]:
    """`asked`, or the first rank of the first, a middle and the last pipeline stage.

    Raises:
        ConfigError: a rank that the job does not have.
    """
    assert parallel.data is not None
    stage = parallel.tensor * parallel.data  # ranks of one pipeline stage are neighbours
    world_size = stage * parallel.pipeline
    if asked is None:
        return sorted({0, stage * (parallel.pipeline // 2), stage * (parallel.pipeline - 1)})
    if wrong := [rank for rank in asked if rank >= world_size]:
        raise ConfigError(f"dry_run_ranks={wrong}: the job has {world_size} ranks, 0 .. {world_size - 1}")
    return list(dict.fromkeys(asked))


def build_rank(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    *,
    rank: int,
    reward: RewardConfig | None = None,
) -> BuiltRank:
    """Build one rank as its process would, with Megatron-core's own checks; no weight takes memory.

    FP8 changes no shape and its layers need a GPU to be made: the bf16 ones stand in for them.

    Raises:
        ValueError: a layout or precision that the model cannot have.
    """
    import torch

    from nemo_align.model.build import build_model
    from nemo_align.runtime.topology import pretended_rank

    assert parallel.data is not None
    world_size = parallel.tensor * parallel.pipeline * parallel.data
    try:
        with pretended_rank(parallel, rank=rank, world_size=world_size) as topology, torch.device("meta"):
            chunks = build_model(model, parallel, replace(precision, fp8="none"), topology, reward_head=reward)
    except (AssertionError, ValueError) as error:
        if isinstance(error, ValueError) and raised_by_this_package(error):
            raise
        raise ConfigError(f"Megatron-core refuses this configuration: {error}") from error
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision.dtype]
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    in_dtype = sum(parameter.numel() for parameter in parameters if parameter.dtype == dtype)
    ends = ["embedding"] if any(chunk.pre_process for chunk in chunks) else []
    if any(chunk.post_process for chunk in chunks):
        ends.append("output layer" if reward is None else f"reward head of {len(reward.attributes)}")
    return BuiltRank(
        rank=rank,
        place=f"pipeline {topology.pipeline_rank}, data {topology.data_rank}, tensor {topology.tensor_rank}",
        layers=tuple(layer.layer_number for chunk in chunks for layer in chunk.decoder.layers),
        num_chunks=len(chunks),
        ends=tuple(ends),
        model_parameters=in_dtype,
        fp32_parameters=sum(parameter.numel() for parameter in parameters) - in_dtype,
    )


def state_bytes(built: BuiltRank, parallel: ParallelConfig, precision: PrecisionConfig) -> StateBytes:
    """Weights, gradient buffer and optimizer state of a training rank.

    bf16 weights have an fp32 copy and two fp32 moments (12 bytes), fp32 ones the moments alone (8); the distributed
    optimizer shards these over the data-parallel ranks.
    """
    bf16 = precision.dtype == "bf16"
    shards = parallel.data if parallel.distributed_optimizer else 1
    assert shards is not None
    optimizer = (12 if bf16 else 8) * built.model_parameters + 8 * built.fp32_parameters
    half = bf16 and not precision.grad_reduce_fp32
    return StateBytes(
        weights=(2 if bf16 else 4) * built.model_parameters + 4 * built.fp32_parameters,
        gradients=(2 if half else 4) * built.model_parameters + 4 * built.fp32_parameters,
        optimizer=-(-optimizer // shards),
    )


def section(
    built: Sequence[BuiltRank], parallel: ParallelConfig, precision: PrecisionConfig, findings: Findings, training: bool
) -> Section:
    """A line for each rank; a warning where its state alone is more than a GPU holds."""
    lines = []
    for rank in built:
        held = [f"{len(rank.layers)} layers in {rank.num_chunks} chunks ({_numbers(rank.layers)})", *rank.ends]
        lines.append(f"rank {rank.rank} ({rank.place}): {', '.join(held)}: {rank.parameters:,} parameters")
        state = state_bytes(rank, parallel, precision)
        if not training:
            lines.append(f"    weights {number_of_bytes(state.weights)}")
            continue
        lines.append(
            f"    weights {number_of_bytes(state.weights)} + gradients {number_of_bytes(state.gradients)} + optimizer "
            f"{number_of_bytes(state.optimizer)} = {number_of_bytes(state.total)}, activations come on top"
        )
        if state.total > GPU_BYTES:
            findings.warnings.append(
                f"rank {rank.rank} holds {number_of_bytes(state.total)} before any activation, more than a GPU of "
                f"{number_of_bytes(GPU_BYTES)}: split the model further (parallel.tensor, parallel.pipeline), or its "
                "optimizer state over more replicas (parallel.data)"
            )
    return Section("ranks, built on the meta device", lines)


def _numbers(layers: Sequence[int]) -> str:
    """`1-8`, or `1, 13, 25, ... 85` of interleaved chunks."""
    if len(layers) > 1 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]}-{layers[-1]}"
    shown = [str(layer) for layer in layers]
    return ", ".join(shown if len(shown) < 6 else [*shown[:3], f"... {shown[-1]}"])
