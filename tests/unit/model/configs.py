"""Configurations that several tests of this room share."""

from __future__ import annotations

from typing import Any

from nemo_align.config.model import ModelConfig


def tiny_model(**changes: Any) -> ModelConfig:
    """Head size x heads (128) is not hidden (64), four query heads share a group, vocabulary 250 needs padding."""
    fields = {
        "name": "tiny",
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 192,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "head_dim": 16,
        "vocab_size": 250,
        "make_vocab_size_divisible_by": 4,
        "max_sequence_length": 64,
        "init_std": 0.05,
    }
    return ModelConfig(**{**fields, **changes})


def transformer_config(**changes: Any):
    """Megatron's config with the fields that single modules look at. The facade must be installed."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = {
        "num_layers": 1,
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "layernorm_zero_centered_gamma": True,
        "attention_dropout": 0.0,
    }
    return TransformerConfig(**{**fields, **changes})
