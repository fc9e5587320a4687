"""Parameters and FLOPs of a Nemotron decoder, in closed form. Imports neither torch nor Megatron.

The FLOP convention is that of the Nemotron-4 report (arXiv 2406.11704, Table 2): 6 FLOPs per matrix weight and token
for forward plus backward, norms and the input embedding not counted, attention over the full square of each segment
(not halved for causality), recomputation not counted.

    q = heads * head_dim     k = groups * head_dim     h = hidden_size
    N = layers * (h * (q + 2k) + q * h + 2 * h * ffn)                     matrix weights of the layers
    flops = 6 * tokens * N + 6 * logit_tokens * vocab * h + 12 * layers * q * squared_tokens
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_align.config.model import ModelConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig

# Tokens of a matrix product that Transformer Engine's FP8 recipes want a multiple of (NVIDIA's kernels).
FP8_MULTIPLE = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128}


# Layers at each end of the model that a recipe keeps in bf16 unless told otherwise.
_BF16_LAYERS = {"none": 0, "delayed": 0, "tensorwise": 1, "blockwise": 0}


def bf16_layers(precision: PrecisionConfig) -> tuple[int, int]:
    """(first, last) layers of the model whose products stay in bf16 under FP8."""
    own = _BF16_LAYERS[precision.fp8]
    first, last = precision.bf16_first_layers, precision.bf16_last_layers
    return own if first is None else first, own if last is None else last


def overlaps_p2p(parallel: ParallelConfig) -> bool:
    """Whether GPUs send activations on beside the passes of other micro-batches."""
    return parallel.virtual_pipeline > 1 if parallel.overlap_p2p is None else parallel.overlap_p2p


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of the whole model, without vocabulary padding."""

    embedding: int  # input embedding
    output: int  # output projection
    layers: int  # matrix weights of the layers
    norms: int  # weights and biases of every LayerNorm

    @property
    def total(self) -> int:
        return self.embedding + self.output + self.layers + self.norms


def head_dim(model: ModelConfig) -> int:
    """Channels of one attention head: `model.head_dim`, or hidden_size / num_attention_heads when that is null.

    Raises ValueError when the division is not exact.
    """
    if model.head_dim is not None:
        return model.head_dim
    if model.hidden_size % model.num_attention_heads:
        raise ValueError(
            f"model.hidden_size={model.hidden_size} is not a multiple of "
            f"model.num_attention_heads={model.num_attention_heads}: set model.head_dim"
        )
    return model.hidden_size // model.num_attention_heads


def padded_vocab_size(model: ModelConfig, tensor: int) -> int:
    """Rows of both embeddings: the vocabulary rounded up to make_vocab_size_divisible_by x tensor parallel size."""
    multiple = model.make_vocab_size_divisible_by * tensor
    return -(-model.vocab_size // multiple) * multiple


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters by kind. Padding rows of the vocabulary are not counted: they depend on the layout."""
    embedding = model.vocab_size * model.hidden_size
    num_norms = 2 * model.num_layers + 1  # two in each layer and the final one
    return ParameterCount(
        embedding=embedding,
        output=embedding,
        layers=model.num_layers * _matrix_weights_of_a_layer(model),
        norms=num_norms * 2 * model.hidden_size,
    )


def checkpoint_bytes(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, *, reward_head: int | None = None
) -> int:
    """Bytes of one checkpoint with optimizer state: all ranks together, padding rows included, without small files.

    bf16: 2 of the weight, 4 of its fp32 copy and 8 of the moments. fp32: 4 and 8, and the distributed optimizer writes
    its copy of the weight too (4). `reward_head`: parameters of a reward model's head, which is fp32 always and stands
    in place of the output projection; None: a policy.
    """
    count = count_parameters(model)
    padding = (padded_vocab_size(model, parallel.tensor) - model.vocab_size) * model.hidden_size
    in_fp32 = 16 if parallel.distributed_optimizer else 12
    per_parameter = 14 if precision.dtype == "bf16" else in_fp32
    parameters = count.total + 2 * padding
    if reward_head is None:
        return per_parameter * parameters
    return per_parameter * (parameters - count.output - padding) + in_fp32 * reward_head


def flops(model: ModelConfig, *, tokens: int, squared_tokens: int, logit_tokens: int, causal: bool = False) -> int:
    """Model FLOPs of forward plus backward; a forward pass alone is exactly a third (`// 3`).

    tokens: real tokens that pass through the layers, prompts included.
    squared_tokens: sum over segments of the squared segment length.
    logit_tokens: positions whose logits are computed: `tokens` for a policy, 0 for a reward model.
    causal: halve attention, as Megatron-LM counts it; the report does not.

    A Python int: one step of the report's last phase (1.99e19) does not fit into int64.
    """
    tokens, squared_tokens, logit_tokens = int(tokens), int(squared_tokens), int(logit_tokens)
    layers = 6 * tokens * model.num_layers * _matrix_weights_of_a_layer(model)
    logits = 6 * logit_tokens * model.vocab_size * model.hidden_size
    attention = 12 * model.num_layers * model.num_attention_heads * head_dim(model) * squared_tokens
    return layers + logits + (attention // 2 if causal else attention)


def crossover_length(model: ModelConfig) -> int:
    """Segment length at which attention costs as much as the matrix weights: 6 N s = 12 L q s^2 with q = heads x d."""
    layer_weights = count_parameters(model).layers // model.num_layers
    return max(1, layer_weights // (2 * model.num_attention_heads * head_dim(model)))


def _matrix_weights_of_a_layer(model: ModelConfig) -> int:
    query = model.num_attention_heads * head_dim(model)
    key = model.num_query_groups * head_dim(model)
    attention = model.hidden_size * (query + 2 * key) + query * model.hidden_size
    return attention + 2 * model.hidden_size * model.ffn_hidden_size
