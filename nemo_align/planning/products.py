"""Time of one matrix product on an H100, by its shape.

An SM computes one output tile at a time, so a product takes whole waves of tiles; each tile pays for filling and
draining its pipeline; and no product is faster than its operands pass through memory:

    seconds = max(waves x 2 tile_rows tile_columns (k + k0) / (sustained rate / SMs),  bytes / memory rate) + launch

Gradients of weights are added to fp32 values at the end of each tile. A tile fills an SM's memory, so nothing else
hides that: its bytes come on top. They weigh most where a micro-batch has few tokens.
"""

from __future__ import annotations

import functools
import math

from nemo_align.planning import h100

_LAUNCH_SECONDS = 3e-6  # between two kernels of one stream (CUDA's launch latency behind a busy queue)
_BYTES = {"bf16": 2, "fp8": 1, "fp32": 4}


@functools.lru_cache(maxsize=4096)
def product_seconds(rows: int, columns: int, inner: int, kind: str = "bf16", output_bytes: int = 2) -> float:
    """[rows, inner] x [inner, columns]. `kind` of the operands: bf16 | fp8 | fp32; `output_bytes` that pass for a
    result value: 2, or 8 where it is added to fp32 values in memory (read and written)."""
    if not rows or not columns or not inner:
        return 0.0
    flops_per_sm = h100.PEAK_TFLOPS[kind] * 1e12 * h100.SUSTAINED[kind] / h100.NUM_SMS
    waves = min(_waves(rows, columns), _waves(columns, rows))
    tile = 2 * h100.TILE[0] * h100.TILE[1] * (inner + h100.TILE_OVERHEAD_K)
    compute = waves * tile / flops_per_sm
    moved = (rows * inner + inner * columns) * _BYTES[kind] + rows * columns * output_bytes
    added = rows * columns * (output_bytes - 2) / h100.HBM_BYTES_PER_SECOND
    return max(compute + added, moved / h100.HBM_BYTES_PER_SECOND) + _LAUNCH_SECONDS


def efficiency(rows: int, columns: int, inner: int, kind: str = "bf16") -> float:
    """Part of the dense peak that a product reaches."""
    return 2 * rows * columns * inner / product_seconds(rows, columns, inner, kind) / h100.PEAK_TFLOPS[kind] / 1e12


def _waves(rows: int, columns: int) -> float:
    tiles = math.ceil(rows / h100.TILE[0]) * math.ceil(columns / h100.TILE[1])
    return math.ceil(tiles / h100.NUM_SMS)


def attention_seconds(query_width: int, squared_tokens: float) -> tuple[float, float]:
    """(forward, backward) of causal flash attention. `query_width`: heads x head_dim of this rank; `squared_tokens`:
    sum of squared segment lengths. Two products of half a square each way forward, five backward."""
    forward = 2 * query_width * squared_tokens
    peak = h100.PEAK_TFLOPS["bf16"] * 1e12
    return (
        forward / (peak * h100.ATTENTION[0]) + _LAUNCH_SECONDS,
        2.5 * forward / (peak * h100.ATTENTION[1]) + _LAUNCH_SECONDS,
    )


def memory_seconds(num_bytes: float) -> float:
    """Kernels that only stream memory."""
    return num_bytes / h100.HBM_BYTES_PER_SECOND
