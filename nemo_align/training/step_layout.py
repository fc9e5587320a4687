"""How the steps of a stage are laid out, from its config and the topology."""

from __future__ import annotations

from nemo_align.config.model import ModelConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.data.step_plan import StepLayout
from nemo_align.model.counts import FP8_MULTIPLE, crossover_length
from nemo_align.runtime.topology import Topology


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
    pad_to = FP8_MULTIPLE[precision.fp8] * (topology.tensor if parallel.sequence else 1)
    return StepLayout(
        capacity=-(-capacity // pad_to) * pad_to,
        data_parallel=topology.data,
        packing=packing,
        micro_batch_size=micro_batch_size,
        multiple_of=multiple_of,
        pad_to=pad_to,
        fixed_length=on_gpu,
        crossover_length=crossover_length(model),
    )
