"""Causal core attention on torch's scaled_dot_product_attention, for a machine without Transformer Engine.

Megatron-core's own local attention materialises the S x S scores and refuses packed sequences.

Shapes: S sequence, B batch, T packed tokens, N query heads and G key/value heads of this tensor rank, D head size.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from nemo_align.model.packed import SegmentedSequence


class SdpaCoreAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v under a causal mask; packed segments do not see one another.

    Takes the arguments that Megatron-core's self-attention gives to any core attention. It has no parameters and
    reads no state, so it can be recomputed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_,  # context parallelism and process groups: heads are already those of this rank
    ) -> None:
        super().__init__()
        assert attention_type == "self" and attn_mask_type == AttnMaskType.causal
        assert config.attention_dropout == 0.0 and config.context_parallel_size == 1
        self.softmax_scale = softmax_scale  # None: D ** -0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SegmentedSequence | None = None,
    ) -> Tensor:
        """Plain: query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N * D].
        Packed: query [T, N, D], key and value [T, G, D] -> [T, N * D]."""
        assert attention_mask is None and attention_bias is None, "the mask is causal by construction"
        assert attn_mask_type in (None, AttnMaskType.causal)
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params.segment_lengths)
        # [S, B, N, D] -> [B, N, S, D] -> [S, B, N, D]
        context = self._attend(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)))
        return context.permute(2, 0, 1, 3).flatten(2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
        # One split of each tensor, not slices: the backward of a split is one concatenation, while each slice would
        # write a gradient of all T tokens.
        segments = list(zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True))
        numbers_of_length: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            numbers_of_length.setdefault(length, []).append(number)
        contexts: list[Tensor | None] = [None] * len(lengths)
        for numbers in numbers_of_length.values():  # segments of one length share a kernel call
            stacked = (torch.stack([segments[number][part] for number in numbers]) for part in range(3))
            # [n, L, N, D] -> [n, N, L, D] -> [n, L, N * D]
            context = self._attend(*(tensor.transpose(1, 2) for tensor in stacked)).transpose(1, 2).flatten(2)
            for number, segment_context in zip(numbers, context.unbind(), strict=True):
                contexts[number] = segment_context
        return torch.cat(contexts)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, N, S, D], key and value [B, G, S, D] -> [B, N, S, D]; query head n reads group n // (N / G)."""
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.size(1) != key.size(1)
        )
