"""Rates of one GPU that the plan's time model rests on: matrix products by shape, attention, memory, as JSON.

    python tools/bench/gemm_efficiency.py [--json FILE]

Products are those of a transformer layer at several widths and tensor-parallel cuts (forward, and the two of the
backward pass), in bf16 through torch and, where Transformer Engine is importable, in FP8 through its Linear. Each is
repeated for a tenth of a second after a warm-up, on normal random values, with events on the stream as the clock.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

WINDOW_MS = 100.0
TOKENS = [1024, 2048, 4096, 8192]
# (width, feed-forward width, query heads x head_dim, query + key + value width) of one rank
RANKS = {
    "340b_tp8": (18432, 9216, 2304, 2304 + 2 * 192),
    "340b_tp4": (18432, 18432, 4608, 4608 + 4 * 192),
    "15b_tp1": (6144, 24576, 6144, 6144 + 16 * 128),
    "15b_tp8": (6144, 3072, 768, 768 + 2 * 128),
    "4b_tp1": (3072, 9216, 3072, 3072 + 16 * 128),
}


def milliseconds(work: Callable[[], object]) -> float:
    """Mean time of one call, in a window of calls."""
    for _ in range(3):
        work()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    repeats = max(3, min(1000, int(WINDOW_MS / max(begin.elapsed_time(end), 1e-3))))
    begin.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def product(m: int, n: int, k: int) -> dict[str, float]:
    """[m, k] x [k, n] in bf16."""
    left, right = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (n, k)))
    time = milliseconds(lambda: functional.linear(left, right))
    return {"m": m, "n": n, "k": k, "ms": time, "tflops": 2 * m * n * k / time / 1e9}


def fp8_linear(m: int, n: int, k: int) -> dict[str, float]:
    """Forward and backward of Transformer Engine's Linear under the tensorwise recipe, casts included."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    layer = te.Linear(k, n, bias=False, params_dtype=torch.bfloat16, device="cuda")
    inputs = torch.randn(m, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        with te.fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling()):
            output = layer(inputs)
        output.backward(gradient)
        layer.weight.grad = inputs.grad = None

    time = milliseconds(work)
    return {"m": m, "n": n, "k": k, "ms": time, "tflops": 6 * m * n * k / time / 1e9}


def attention(batch: int, length: int, heads: int, groups: int, size: int) -> dict[str, float]:
    """Causal attention of torch, forward and backward; FLOPs counted with the mask halved."""
    query, key, value = (
        torch.randn(batch, n, length, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, groups, groups)
    )

    def forward() -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != groups)

    gradient = torch.randn_like(forward())
    flops = 2 * batch * heads * length * length * size  # two products of 2 S S D, half of each
    there = milliseconds(forward)
    both = milliseconds(lambda: torch.autograd.grad(forward(), (query, key, value), gradient))
    return {
        "batch": batch, "length": length, "heads": heads, "groups": groups, "head_dim": size, "forward_ms": there,
        "forward_tflops": flops / there / 1e9, "both_ms": both, "both_tflops": 3.5 * flops / both / 1e9,
    }  # fmt: skip


def memory() -> dict[str, float]:
    """GB/s read and written by a copy, an addition and a layer norm of 1 GiB."""
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    rows = source[: 2**15 * 9216].view(-1, 9216)
    weight = torch.ones(rows.shape[1], device="cuda", dtype=torch.bfloat16)
    return {
        "copy": 2 * 2**30 / milliseconds(lambda: target.copy_(source)) / 1e6,
        "add": 3 * 2**30 / milliseconds(lambda: torch.add(source, target, out=target)) / 1e6,
        "layer_norm": 4 * rows.numel() / milliseconds(lambda: functional.layer_norm(rows, weight.shape, weight)) / 1e6,
        "launch_microseconds": 1e3 * milliseconds(lambda: target[:1].add_(1)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "memory_gb_per_s": memory()}
    found["attention"] = [attention(1, 4096, 12, 1, 192), attention(1, 4096, 48, 8, 128), attention(1, 8192, 12, 1, 192), attention(2, 2048, 24, 8, 128)]  # fmt: skip  # noqa: E501
    found["bf16"], found["fp8"] = [], []
    for name, (width, feed_forward, attended, qkv) in RANKS.items():
        for tokens in TOKENS:
            for part, n, k in (
                ("qkv", qkv, width),
                ("proj", width, attended),
                ("fc1", feed_forward, width),
                ("fc2", width, feed_forward),
            ):
                for pass_, sizes in (("forward", (tokens, n, k)), ("dgrad", (tokens, k, n)), ("wgrad", (n, k, tokens))):
                    found["bf16"].append({"rank": name, "part": part, "pass": pass_, **product(*sizes)})
    found["bf16"].append({"rank": "vocabulary_tp8", "part": "logits", "pass": "forward", **product(4096, 32000, 18432)})
    try:
        for tokens in (2048, 4096, 8192):
            for part, n, k in (("fc1", 9216, 18432), ("fc2", 18432, 9216), ("qkv", 2688, 18432), ("proj", 18432, 2304)):
                found["fp8"].append({"rank": "340b_tp8", "part": part, **fp8_linear(tokens, n, k)})
    except ImportError as error:
        found["fp8"] = f"not measured: {error}"
    text = json.dumps(found, indent=1)
    if options.json:
        options.json.write_text(text)
    for row in found["bf16"]:
        if row["m"] == 4096 or row["k"] == 4096:
            print(f"{row['rank']:>15} {row['part']:>5} {row['pass']:>8} {row['tflops']:7.1f} TFLOP/s")
    print({key: found[key] for key in ("device", "torch", "memory_gb_per_s", "attention", "fp8")})


if __name__ == "__main__":
    main()
