"""LayerNorm1P for a machine without Transformer Engine.

Megatron-core's wrapper of torch's LayerNorm refuses zero-centred weights and sequence parallelism. Transformer Engine
has both, so this module stands in for it in the local layer spec.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional


class LayerNorm1P(nn.Module):
    """y = (x - mean) / sqrt(variance + eps) * (1 + weight) + bias, statistics in fp32, over the last dimension H.

    The weight is stored zero-centred, so weight decay and bf16 rounding act on the distance from 1. `1 + weight` is
    formed in fp32 also when the weight is bf16 (as Transformer Engine does): in bf16 it would lose weights below 2^-8.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        assert config.layernorm_zero_centered_gamma and config.normalization == "LayerNorm"
        self.normalized_shape = (hidden_size,)
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))  # [H]
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))  # [H]
        # Under sequence parallelism each tensor rank sees its part of the tokens only: Megatron's
        # finalize_model_grads sums the gradients of parameters that carry this mark over the tensor group.
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias.sequence_parallel = config.sequence_parallel

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H] of the same dtype."""
        # torch's kernel takes fp32 parameters with a bf16 input and reduces in fp32.
        return functional.layer_norm(
            hidden_states, self.normalized_shape, 1.0 + self.weight.float(), self.bias.float(), self.eps
        )
