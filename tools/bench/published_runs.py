"""What `nemo-align plan` predicts for published runs on DGX H100, beside what was published.

    python tools/bench/published_runs.py [--json FILE]

Each run is described by what its source says. What a source leaves open stands in `open`, with the value taken here.
A gated MLP (Llama) has three matrices of its feed-forward width: it is described by a plain one of 1.5 times the width,
which has the same products. No constant of the model is chosen by run.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nemo_align.config.model import ModelConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.planning.estimate import Estimate
from nemo_align.planning.job import Job, StepWork
from nemo_align.planning.memory import memory_plan
from nemo_align.planning.step_time import step_time


@dataclass(frozen=True, kw_only=True)
class Run:
    """A published run: its layout, and seconds of a step (from MFU, tokens/s or TFLOP/s where that is published)."""

    source: str
    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int
    tensor: int
    pipeline: int
    virtual: int
    data: int
    batch: int
    rows: int = 1  # sequences of a micro-batch
    length: int = 4096
    fp8: str = "none"
    overlap: bool = True  # tensor-parallel communication and parameter gather overlap
    bf16_gradients: bool = False  # accumulated and reduced in bf16
    open: str = ""
    step_seconds: float | None = None
    mfu: float | None = None  # percent, attention in full, of 989 TFLOP/s
    tokens_per_gpu: float | None = None  # per second


REPORT = "Nemotron-4 report, Table 2 (arXiv 2406.11704)"
DGXC = "NVIDIA dgxc-benchmarking, Nemotron4 24.11"
README = "Megatron-LM README, weak scaling (r0.8)"
NEMO = "NeMo performance summary, 24.07, FP8"
LLAMA = "Llama 3, Table 4 (arXiv 2407.21783)"

N340 = {"layers": 96, "hidden": 18432, "ffn": 73728, "heads": 96, "groups": 8, "vocabulary": 256000}
N15 = {"layers": 32, "hidden": 6144, "ffn": 24576, "heads": 48, "groups": 8, "vocabulary": 256000}
GPT3 = {"layers": 96, "hidden": 12288, "ffn": 49152, "heads": 96, "groups": 96, "vocabulary": 51200, "length": 2048}
L70 = {"layers": 80, "hidden": 8192, "ffn": 28672 * 3 // 2, "heads": 64, "groups": 8, "vocabulary": 32000}
L405 = {"layers": 128, "hidden": 16384, "ffn": 53248 * 3 // 2, "heads": 128, "groups": 8, "vocabulary": 128256}
PAPER = {**N340, "overlap": False, "open": "VP 8, no TP overlap"}
META = {**L405, "length": 8192, "overlap": False, "open": "VP 8, 128 layers for 126"}
BF16, FP8 = {"bf16_gradients": True}, {"bf16_gradients": True, "fp8": "delayed"}  # of NeMo's recipes


def _run(source: str, name: str, model: dict, layout: tuple[int, int, int, int], batch: int, **rest) -> Run:
    """`layout`: TP, PP, VP, DP."""
    sizes = dict(zip(("tensor", "pipeline", "virtual", "data"), layout, strict=True))
    return Run(source=source, name=name, batch=batch, **{**model, **sizes, **rest})


def _readme(name: str, heads: int, hidden: int, layers: int, layout: tuple[int, int], batch: int, mfu: float) -> Run:
    """`layout`: TP, PP; 48 replicas. Taken for all: one layer per chunk, two sequences where there is no pipeline."""
    tensor, pipeline = layout
    virtual, rows = (layers // pipeline, 1) if pipeline > 1 else (1, 2)
    taken = f"VP {virtual}, micro-batch 1" if pipeline > 1 else "micro-batch 2"
    sizes = {"layers": layers, "hidden": hidden, "ffn": 4 * hidden, "heads": heads, "groups": heads}
    model = {**sizes, "vocabulary": 131072, "rows": rows, "open": taken}
    return _run(README, name, model, (tensor, pipeline, virtual, 48), batch, mfu=mfu)


RUNS = [
    _run(REPORT, "340B, 1,536 GPUs", PAPER, (8, 12, 8, 16), 768, mfu=42.4),
    _run(REPORT, "340B, 3,072 GPUs", PAPER, (8, 12, 8, 32), 1536, mfu=42.3),
    _run(REPORT, "340B, 6,144 GPUs", PAPER, (8, 12, 8, 64), 2304, mfu=41.0),
    _run(DGXC, "340B, 128 GPUs", N340, (8, 8, 12, 2), 32, step_seconds=4.61, **BF16),
    _run(DGXC, "340B, 2,048 GPUs", N340, (8, 8, 12, 32), 512, step_seconds=4.84, **BF16),
    _run(DGXC, "340B FP8, 128 GPUs", N340, (8, 8, 12, 2), 32, step_seconds=3.16, **FP8),
    _run(DGXC, "340B FP8, 2,048 GPUs", N340, (8, 8, 12, 32), 512, step_seconds=3.49, **FP8),
    _run(DGXC, "15B, 16 GPUs", N15, (4, 1, 1, 4), 64, rows=4, step_seconds=2.83, **BF16),
    _run(DGXC, "15B, 2,048 GPUs", N15, (4, 1, 1, 512), 8192, rows=4, step_seconds=2.96, **BF16),
    _run(DGXC, "15B FP8, 16 GPUs", N15, (4, 1, 1, 4), 64, rows=4, step_seconds=2.08, **FP8),
    _readme("1.7B, 48 GPUs", 16, 2048, 24, (1, 1), 192, 41),
    _readme("7.1B, 96 GPUs", 32, 4096, 30, (2, 1), 192, 47),
    _readme("16B, 192 GPUs", 48, 6144, 32, (4, 1), 192, 49),
    _readme("32B, 384 GPUs", 56, 7168, 48, (8, 1), 192, 46),
    _readme("70B, 768 GPUs", 64, 8192, 84, (8, 2), 384, 42),
    _readme("119B, 1,536 GPUs", 80, 10240, 92, (8, 4), 768, 43),
    _readme("177B, 2,304 GPUs", 96, 12288, 96, (8, 6), 1152, 44),
    _readme("314B, 3,072 GPUs", 128, 16384, 96, (8, 8), 1536, 48),
    _readme("462B, 6,144 GPUs", 144, 18432, 112, (8, 16), 3072, 47),
    _run(NEMO, "GPT-3 175B, 128 GPUs", GPT3, (4, 8, 6, 4), 256, tokens_per_gpu=726, **FP8),
    _run(NEMO, "GPT-3 175B, 512 GPUs", GPT3, (4, 8, 6, 16), 2048, rows=2, tokens_per_gpu=782, **FP8),
    _run(NEMO, "340B, 128 GPUs", N340, (8, 8, 12, 2), 32, tokens_per_gpu=322, **FP8),
    _run(NEMO, "Llama 2 70B, 64 GPUs", L70, (4, 4, 20, 4), 128, tokens_per_gpu=1707, **FP8),
    _run(LLAMA, "405B, 8,192 GPUs", META, (8, 16, 8, 64), 2048, mfu=43),
    _run(LLAMA, "405B, 16,384 GPUs", META, (8, 16, 8, 128), 2048, mfu=41),
]


def predict(run: Run) -> Estimate:
    """The plan of a run."""
    model = ModelConfig(
        name=run.name,
        num_layers=run.layers,
        hidden_size=run.hidden,
        ffn_hidden_size=run.ffn,
        num_attention_heads=run.heads,
        num_query_groups=run.groups,
        vocab_size=run.vocabulary,
    )
    parallel = ParallelConfig(
        tensor=run.tensor,
        pipeline=run.pipeline,
        virtual_pipeline=run.virtual,
        data=run.data,
        sequence=run.tensor > 1,
        overlap_grad_reduce=True,
        overlap_param_gather=run.overlap,
        overlap_tensor=run.overlap and run.tensor > 1,
    )
    work = StepWork(
        examples=run.batch,
        micro_batches=run.batch // run.data // run.rows,
        tokens=run.rows * run.length,
        squared_tokens=run.rows * run.length**2,
        real_tokens=run.batch * run.length,
        real_squared_tokens=run.batch * run.length**2,
        rows=run.rows,
    )
    precision = PrecisionConfig(fp8=run.fp8, grad_reduce_fp32=not run.bf16_gradients)
    job = Job(model=model, parallel=parallel, precision=precision, work=work)
    return Estimate(job, memory_plan(job), step_time(job))


def compare(run: Run) -> dict[str, float | str | bool]:
    """Published and predicted seconds of a step, and MFU in percent of the bf16 peak for both."""
    found = predict(run)
    seconds, gpus = found.time.total, found.job.world_size
    flops = found.flops
    if run.step_seconds is not None:
        published = run.step_seconds
    elif run.tokens_per_gpu is not None:
        published = run.batch * run.length / gpus / run.tokens_per_gpu
    else:
        assert run.mfu is not None
        published = flops / gpus / 989e12 / (run.mfu / 100)
    return {
        "source": run.source,
        "run": run.name,
        "published_seconds": published,
        "predicted_seconds": seconds,
        "published_mfu": 100 * flops / published / gpus / 989e12,
        "predicted_mfu": 100 * flops / seconds / gpus / 989e12,
        "error_percent": 100 * (seconds / published - 1),
        "open": run.open,
    }


def table(rows: list[dict] | None = None) -> list[str]:
    """The comparison as lines of Markdown."""
    found = [compare(run) for run in RUNS] if rows is None else rows
    lines = [
        "| run | published, s | predicted, s | published MFU | predicted MFU | time off by | taken where it is open |",
        "|---|---|---|---|---|---|---|",
    ]
    source = None
    for row in found:
        if row["source"] != source:
            source = row["source"]
            lines.append(f"| **{source}** | | | | | | |")
        seconds = f"{row['published_seconds']:.2f} | {row['predicted_seconds']:.2f}"
        mfu = f"{row['published_mfu']:.1f} | {row['predicted_mfu']:.1f} | {row['error_percent']:+.1f} %"
        lines.append(f"| {row['run']} | {seconds} | {mfu} | {row['open']} |")
    errors = [float(row["error_percent"]) for row in found]
    absolute = [abs(error) for error in errors]
    mean = f"mean {sum(errors) / len(errors):+.1f} %, mean of the absolute values {sum(absolute) / len(absolute):.1f} %"
    lines.append(f"| all | | | | | {mean}, largest {max(absolute):.1f} % | |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    rows = [compare(run) for run in RUNS]
    print("\n".join(table(rows)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
