"""Names and shapes of the weights on both sides: Megatron-core's and those of transformers' `nemotron`.

The tables below are the whole mapping; import and export walk them. LayerNorm weights are zero-centred on both sides
and are copied as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_align.config.model import ModelConfig
from nemo_align.model.counts import head_dim

COPY, QKV = "copy", "qkv"
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
FINAL_NORM_BIAS = "decoder.final_layernorm.bias"
HEAD_WEIGHT, HEAD_BIAS = "reward_head.weight", "reward_head.bias"
SCORE = "score.weight"

# Sizes: V vocabulary, H hidden, F feed-forward, Q = query heads x head size, K = key heads x head size.
# (Megatron-core, Hugging Face, how, shape of each tensor on the Hugging Face side)
_LAYER = (
    ("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",), COPY, ("H",)),
    ("self_attention.linear_qkv.layer_norm_bias", ("input_layernorm.bias",), COPY, ("H",)),
    (
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        QKV,
        ("QH", "KH", "KH"),
    ),
    ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), COPY, ("HQ",)),
    ("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",), COPY, ("H",)),
    ("mlp.linear_fc1.layer_norm_bias", ("post_attention_layernorm.bias",), COPY, ("H",)),
    ("mlp.linear_fc1.weight", ("mlp.up_proj.weight",), COPY, ("FH",)),
    ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), COPY, ("HF",)),
)
_FIRST = ((EMBEDDING, ("model.embed_tokens.weight",), COPY, ("VH",)),)
_LAST = (
    ("decoder.final_layernorm.weight", ("model.norm.weight",), COPY, ("H",)),
    (FINAL_NORM_BIAS, ("model.norm.bias",), COPY, ("H",)),
)
_POLICY = ((OUTPUT, ("lm_head.weight",), COPY, ("VH",)),)
_MOST_LAYERS = 10_000
_MEGATRON_LAYER, _HF_LAYER = "decoder.layers.{}.", "model.layers.{}."


@dataclass(frozen=True)
class Weight:
    """One Megatron-core tensor and the Hugging Face tensors that hold the same values."""

    megatron: str
    hf: tuple[str, ...]
    how: str  # copy | qkv
    hf_shapes: tuple[tuple[int, ...], ...]

    @property
    def has_vocabulary_rows(self) -> bool:
        """Whether Megatron-core's tensor may have padding rows at the end."""
        return self.megatron in (EMBEDDING, OUTPUT)

    @property
    def megatron_shape(self) -> tuple[int, ...]:
        """Shape on Megatron-core's side without vocabulary padding."""
        rows = sum(shape[0] for shape in self.hf_shapes)
        return (rows, *self.hf_shapes[0][1:])


def weight_map(model: ModelConfig, *, has_output_layer: bool) -> list[Weight]:
    """All weights of a model in the order of the forward pass; without output layer for a reward model (head apart).

    Raises ValueError where there are more layers than any model has: the table would fill the memory.
    """
    if model.num_layers > _MOST_LAYERS:
        raise ValueError(f"the model has {model.num_layers:,} layers, at most {_MOST_LAYERS:,} make sense")
    sizes = {
        "V": model.vocab_size,
        "H": model.hidden_size,
        "F": model.ffn_hidden_size,
        "Q": model.num_attention_heads * head_dim(model),
        "K": model.num_query_groups * head_dim(model),
    }

    def weights(rows: tuple, megatron_prefix: str = "", hf_prefix: str = "") -> list[Weight]:
        return [
            Weight(
                megatron_prefix + megatron,
                tuple(hf_prefix + name for name in hf),
                how,
                tuple(tuple(sizes[letter] for letter in shape) for shape in shapes),
            )
            for megatron, hf, how, shapes in rows
        ]

    found = weights(_FIRST)
    for layer in range(model.num_layers):
        found += weights(_LAYER, _MEGATRON_LAYER.format(layer), _HF_LAYER.format(layer))
    return found + weights(_LAST) + (weights(_POLICY) if has_output_layer else [])
