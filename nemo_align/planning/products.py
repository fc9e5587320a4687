"""Time of one matrix product on an H100, by its shape.

Power limits what all SMs together sustain; an SM computes one output tile at a time, at most at the peak rate; each
tile pays for filling and draining its pipeline; and no product is faster than its operands pass through memory:

    seconds = max(2 rows columns (k + k0) / sustained rate,
                  waves x 2 tile_rows tile_columns (k + k0) / (peak rate / SMs),
                  bytes / memory rate)

Gradients of weights are added to fp32 values at the end of each tile. A tile fills an SM's memory, so nothing else
hides that: its bytes come on top. They weigh most where a micro-batch has few tokens.
"""

from __future__ import annotations

import functools
import math

from nemo_align.planning import h100

_BYTES = {"bf16": 2, "fp8": 1, "fp8_blockwise": 1, "fp32": 4}


@functools.lru_cache(maxsize=4096)
def product_seconds(rows: int, columns: int, inner: int, kind: str = "bf16", output_bytes: int = 2) -> float:
    """[rows, inner] x [inner, columns]. `kind` of the operands: bf16 | fp8 | fp8_blockwise | fp32; `output_bytes` that
    pass for a result value: 2, or 8 where it is added to fp32 values in memory (read and written)."""
    if not rows or not columns or not inner:
        return 0.0
    peak = h100.PEAK_TFLOPS[kind.partition("_")[0]] * 1e12
    length = 2 * (inner + h100.TILE_OVERHEAD_K)
    powered = rows * columns * length / (h100.SUSTAINED[kind] * peak)
    clocked = (
        min(_waves(rows, columns, *tile) * tile[0] * tile[1] for tile in h100.TILES) * length * h100.NUM_SMS / peak
    )
    compute = max(powered, clocked)
    moved = (rows * inner + inner * columns) * _BYTES[kind] + rows * columns * output_bytes
    added = rows * columns * (output_bytes - 2) / h100.HBM_BYTES_PER_SECOND
    return max(compute + added, moved / h100.HBM_BYTES_PER_SECOND)


def efficiency(rows: int, columns: int, inner: int, kind: str = "bf16") -> float:
    """Part of the dense peak that a product reaches."""
    return 2 * rows * columns * inner / product_seconds(rows, columns, inner, kind) / h100.PEAK_TFLOPS[kind] / 1e12


def _waves(rows: int, columns: int, tile_rows: int, tile_columns: int) -> int:
    return math.ceil(math.ceil(rows / tile_rows) * math.ceil(columns / tile_columns) / h100.NUM_SMS)


def attention_seconds(heads: int, head_dim: int, squared_tokens: float) -> tuple[float, float]:
    """(forward, backward) of causal flash attention. `heads`: query heads of this rank; `squared_tokens`: sum of
    squared segment lengths. Two products of half a square forward, five backward."""
    forward = 2 * heads * head_dim * squared_tokens
    peak = h100.PEAK_TFLOPS["bf16"] * 1e12
    there, back = h100.ATTENTION[0 if head_dim <= 128 else 1]
    return forward / (peak * there), 2.5 * forward / (peak * back)


def memory_seconds(num_bytes: float) -> float:
    """Kernels that only stream memory."""
    return num_bytes / h100.HBM_BYTES_PER_SECOND
