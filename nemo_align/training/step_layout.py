"""How the steps of a stage are laid out, from its config and the topology."""

from __future__ import annotations

from nemo_align.config.model import ModelConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.data.step_plan import StepLayout
from nemo_align.model.counts import count_parameters, head_dim
from nemo_align.runtime.topology import Topology

# Tokens of a GEMM that Transformer Engine's FP8 recipes want a multiple of (megatron.md 5; NVIDIA's kernels).
FP8_MULTIPLE = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128}


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


def crossover_length(model: ModelConfig) -> int:
    """Segment length at which attention costs as much as the matrix weights: 6 N s = 12 L q s^2 with q = heads x d."""
    layer_weights = count_parameters(model).layers // model.num_layers
    return max(1, layer_weights // (2 * model.num_attention_heads * head_dim(model)))
