"""Segment boundaries of a packed micro-batch, in the form that Megatron-core's attention takes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class SegmentedSequence(PackedSeqParams):
    """PackedSeqParams that also knows its segment lengths on the host.

    They are read from the tensor once per micro-batch, not once per layer and direction. Only on a CPU: on a GPU that
    read would wait for the device, and its kernels take the tensor.
    """

    segment_lengths: tuple[int, ...] | None = None  # tokens of each segment that is not empty; None on a GPU


def packed_seq_params(cu_seqlens: Tensor, max_seqlen: int) -> SegmentedSequence:
    """Boundaries [0, end of segment 0, ..., S] (int32, n+1) of a packed sequence of S tokens (batch of one).

    The boundaries cover all S tokens: padding at the end is a segment as any other. max_seqlen is the length of the
    longest segment in tokens, padding included, or a bound above it.
    """
    lengths = None
    if not cu_seqlens.is_cuda and not cu_seqlens.is_meta:
        boundaries = cu_seqlens.tolist()
        lengths = tuple(end - begin for begin, end in pairwise(boundaries) if end > begin)
        assert boundaries[0] == 0 and sum(lengths) == boundaries[-1], f"boundaries must rise from 0: {boundaries}"
        assert max(lengths) <= max_seqlen, f"a segment of {max(lengths)} tokens is above max_seqlen={max_seqlen}"
    return SegmentedSequence(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        segment_lengths=lengths,
    )
