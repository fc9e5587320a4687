"""Whether a model in memory has the architecture that a checkpoint was made for.

Shapes do not tell: another rotary part of a head, another norm epsilon or another split of heads into groups fits every
tensor and gives wrong logits.
"""

from __future__ import annotations

import torch

from nemo_align.config.model import ModelConfig
from nemo_align.model.counts import head_dim


def architecture_problems(checkpoint: ModelConfig, model: torch.nn.Module) -> list[str]:
    """Differences between a checkpoint's architecture and a GPTModel, by the names of the `model` config group."""
    config = model.config
    pairs = {
        "num_layers": (checkpoint.num_layers, config.num_layers),
        "hidden_size": (checkpoint.hidden_size, config.hidden_size),
        "ffn_hidden_size": (checkpoint.ffn_hidden_size, config.ffn_hidden_size),
        "num_attention_heads": (checkpoint.num_attention_heads, config.num_attention_heads),
        "num_query_groups": (checkpoint.num_query_groups, config.num_query_groups),
        "head_dim": (head_dim(checkpoint), config.kv_channels),
        "layernorm_epsilon": (checkpoint.layernorm_epsilon, config.layernorm_epsilon),
        "rotary_percent": (checkpoint.rotary_percent, model.rotary_percent),
        "rotary_base": (checkpoint.rotary_base, model.rotary_base),
    }
    return [
        f"model.{name} is {ours}, the checkpoint has {theirs}"
        for name, (theirs, ours) in pairs.items()
        if theirs != ours
    ]
