"""Rotary frequencies of packed sequences for a machine without Transformer Engine's fused kernel.

Given the frequencies of the longest segment, Megatron-core 0.19 turns queries and keys segment by segment in every
layer, each with its own copy (13 % of a step with 20 segments of 100 tokens). Given those of all T packed tokens, both
supported versions turn the whole sequence at once. So this module hands out the frequencies of all tokens.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_align.model.packed import SegmentedSequence


class PackedRotaryEmbedding(RotaryEmbedding):
    """Megatron-core's RotaryEmbedding; for a packed sequence positions start again from 0 in each segment.

    GPTModel asks `get_rotary_seq_len` for a length and calls the module with it. The length of a packed sequence is
    here the tuple of its segments' lengths.
    """

    def get_rotary_seq_len(
        self,
        inference_context: None,
        transformer: TransformerBlock,
        transformer_input: Tensor,
        transformer_config: TransformerConfig,
        packed_seq_params: SegmentedSequence | None = None,
    ) -> int | tuple[int, ...]:
        if packed_seq_params is not None:
            assert packed_seq_params.segment_lengths is not None, "made by packed_seq_params() from a tensor on the CPU"
            return packed_seq_params.segment_lengths
        return super().get_rotary_seq_len(inference_context, transformer, transformer_input, transformer_config)

    def forward(self, length: int | tuple[int, ...], **arguments) -> Tensor:
        """Angles [S, 1, 1, R] of positions 0 .. S - 1, or [T, 1, 1, R] of packed tokens; R rotary channels."""
        if isinstance(length, int):
            return super().forward(length, **arguments)
        angles = super().forward(max(length), **arguments)
        return torch.cat([angles[:segment] for segment in length])
