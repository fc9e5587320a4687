"""How the steps of a stage are laid out, from its config and the topology."""

from __future__ import annotations

from nemo_align.config.model import ModelConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.config.stages import (
    PreferenceStageConfig,
    PretrainStageConfig,
    ScoreStageConfig,
    TrainStageConfig,
    WorkerConfig,
)
from nemo_align.data.step_plan import StepLayout
from nemo_align.model.counts import FP8_MULTIPLE, crossover_length
from nemo_align.runtime.topology import Topology


def micro_batch_capacity(config: WorkerConfig) -> int:
    """Tokens of a packed micro-batch; without packing, of the longest example. Before padding."""
    length = config.data.sequence_length
    if isinstance(config, ScoreStageConfig):
        return config.micro_batch_tokens or length
    assert isinstance(config, TrainStageConfig)
    longest = 2 * length if isinstance(config, PreferenceStageConfig) else length
    packs = config.train.packing and not isinstance(config, PretrainStageConfig)
    return (config.train.micro_batch_tokens or longest) if packs else longest


def padded(capacity: int, parallel: ParallelConfig, precision: PrecisionConfig) -> int:
    """`capacity` up to what the kernels and sequence parallelism want a multiple of."""
    multiple = padding_multiple(parallel, precision)
    return -(-capacity // multiple) * multiple


def padding_multiple(parallel: ParallelConfig, precision: PrecisionConfig) -> int:
    """Tokens that the length of a micro-batch is a multiple of."""
    return FP8_MULTIPLE[precision.fp8] * (parallel.tensor if parallel.sequence else 1)


def step_layout(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    topology: Topology,
    *,
    capacity: int,
    packing: bool,
    micro_batch_size: int,
) -> StepLayout:
    """`capacity`: tokens of a packed micro-batch; without packing, tokens of the longest example."""
    on_gpu = topology.device.type == "cuda"
    # An interleaved schedule wants whole rounds of micro-batches; 1F1B takes any number.
    multiple_of = topology.pipeline if topology.virtual_pipeline > 1 else 1
    return StepLayout(
        capacity=padded(capacity, parallel, precision),
        data_parallel=topology.data,
        packing=packing,
        micro_batch_size=micro_batch_size,
        multiple_of=multiple_of,
        pad_to=padding_multiple(parallel, precision),
        fixed_length=on_gpu,
        crossover_length=crossover_length(model),
    )
