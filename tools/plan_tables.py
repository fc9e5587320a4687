"""The tables of docs/plan.md, from the plan's own code.

    python tools/plan_tables.py

A test compares them with the page, so the page cannot go stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import published_runs

from nemo_align.config.model import ModelConfig
from nemo_align.config.model_file import read_model
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.planning import h100
from nemo_align.planning.estimate import Estimate
from nemo_align.planning.job import Job, StepWork
from nemo_align.planning.memory import memory_plan
from nemo_align.planning.products import efficiency, product_seconds
from nemo_align.planning.step_time import step_time

GPUS, BATCH, LENGTH = 1536, 768, 4096
PAPER: dict[str, Any] = {
    "tensor": 8,
    "pipeline": 12,
    "virtual_pipeline": 8,
    "sequence": True,
    "overlap_grad_reduce": True,
}


def planned(
    *, gpus: int = GPUS, batch: int = BATCH, rows: int = 1, fp8: str = "none", overlap: bool = False, **layout: Any
) -> Estimate:
    """The 340B on 1,536 GPUs as in the first row of the report's Table 2, with something changed."""
    keys = {**PAPER, **layout}
    data = gpus // (keys["tensor"] * keys["pipeline"])
    work = StepWork(
        examples=batch,
        micro_batches=batch // data // rows,
        tokens=rows * LENGTH,
        squared_tokens=rows * LENGTH**2,
        real_tokens=batch * LENGTH,
        real_squared_tokens=batch * LENGTH**2,
        rows=rows,
    )
    job = Job(
        model=read_model("nemotron4_340b"),
        parallel=ParallelConfig(**keys, data=data),
        precision=PrecisionConfig(fp8=fp8),
        work=work,
        tensor_overlap=overlap,
    )
    return Estimate(job, memory_plan(job), step_time(job))


# What changes, and to what. The number of GPUs and the batch stay, so DP follows.
MOVES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "TP": [("TP 2", {"tensor": 2}), ("TP 4", {"tensor": 4}), ("TP 8", {})],
    "PP": [(f"PP {p}, VP {96 // p}", {"pipeline": p, "virtual_pipeline": 96 // p}) for p in (4, 6, 8, 12, 16, 24, 48)],
    "VP": [(f"VP {v}", {"virtual_pipeline": v}) for v in (1, 2, 4, 8)],
    "recompute": [(name, {"recompute": name}) for name in ("none", "selective", "full")],
    "micro-batch": [(f"micro-batch of {rows}", {"rows": rows}) for rows in (1, 2, 4)],
    "sequence parallel": [("on", {}), ("off", {"sequence": False})],
    "precision": [("bf16", {})] + [(f"FP8 {name}", {"fp8": name}) for name in ("delayed", "tensorwise", "blockwise")],
    "overlap": [
        ("gradients only", {}),
        ("nothing", {"overlap_grad_reduce": False}),
        ("gradients and parameters", {"overlap_param_gather": True}),
        ("tensor parallel too", {"overlap_param_gather": True, "overlap": True}),
    ],
}


def moves() -> Iterator[str]:
    yield "| | what | DP | micro-batches | GB, largest rank | fits | step, s | MFU | bubble |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, rows in MOVES.items():
        for label, changes in rows:
            found = planned(**changes)
            job, memory, time = found.job, found.memory, found.time
            yield (
                f"| {name} | {label} | {job.data} | {job.work.micro_batches} | {memory.largest.total / 1e9:.1f} "
                f"| {'yes' if memory.fits else 'no'} | {time.total:.2f} | {100 * found.mfu:.1f} % "
                f"| {100 * time.bubble_fraction:.1f} % |"
            )
            name = ""


def table_2() -> Iterator[str]:
    yield "| GPUs | global batch | MFU, report | MFU, plan | step, s, report | step, s, plan |"
    yield "|---|---|---|---|---|---|"
    for gpus, batch, mfu, seconds in ((1536, 768, 42.4, 10.3), (3072, 1536, 42.3, 10.3), (6144, 2304, 41.0, 8.0)):
        found = planned(gpus=gpus, batch=batch)
        predicted = f"{100 * found.mfu:.1f} | {seconds} | {found.time.total:.2f}"
        yield f"| {gpus:,} | {batch:,} | {mfu} | {predicted} |"


def parts() -> Iterator[str]:
    found = planned()
    yield "| part | stage 0, GB | stage 6, GB | stage 11, GB |"
    yield "|---|---|---|---|"
    stages = [found.memory.stages[number] for number in (0, 6, 11)]
    for name in stages[0].parts():
        values = [stage.parts()[name] for stage in stages]
        if any(values):
            yield f"| {name.replace('_', ' ')} | {' | '.join(f'{value / 1e9:.2f}' for value in values)} |"
    yield f"| total | {' | '.join(f'{stage.total / 1e9:.1f}' for stage in stages)} |"


def products() -> Iterator[str]:
    yield "| product of a 340B layer at TP 8, 4,096 tokens | rows x columns x inner | part of 989 TFLOP/s |"
    yield "|---|---|---|"
    for name, rows, columns, inner in (
        ("QKV", 4096, 2688, 18432),
        ("projection", 4096, 18432, 2304),
        ("fc1", 4096, 9216, 18432),
        ("fc2", 4096, 18432, 9216),
        ("logits", 4096, 32000, 18432),
    ):
        yield f"| {name} | {rows:,} x {columns:,} x {inner:,} | {100 * efficiency(rows, columns, inner):.1f} % |"


# tools/bench/gpu_training.py on one H200 (torch 2.11, Transformer Engine 2.x, no Apex): step seconds, and GiB that
# tensors held at most. Four layers, four micro-batches of 4,096 tokens.
MEASURED = {
    ("340b_rank", "none"): (0.381, 39.48),
    ("340b_rank", "delayed"): (0.285, 41.96),
    ("340b_rank", "tensorwise"): (0.341, 40.73),
    ("340b_rank", "blockwise"): (0.316, 42.01),
    ("15b", "none"): (0.406, 39.47),
}
MEASURED_MODELS = {
    "340b_rank": {
        "hidden_size": 18432,
        "ffn_hidden_size": 9216,
        "num_attention_heads": 12,
        "num_query_groups": 1,
        "head_dim": 192,
    },
    "15b": {"hidden_size": 6144, "ffn_hidden_size": 24576, "num_attention_heads": 48, "num_query_groups": 8},
}
H200_BYTES_PER_SECOND = 4.8e12 * 0.90


def measured() -> Iterator[str]:
    """The plan with an H200's memory rate beside what ran there."""
    heads = ("model, 4 layers", "precision", "GiB, measured", "GiB, plan", "S x S in bf16, GiB", "step, s, measured")
    yield f"| {' | '.join((*heads, 'step, s, plan'))} |"
    yield "|---|---|---|---|---|---|---|"
    for (name, fp8), (seconds, memory) in MEASURED.items():
        sizes = MEASURED_MODELS[name]
        model = ModelConfig(name=name, num_layers=4, vocab_size=8192, **sizes)
        work = StepWork(
            examples=4,
            micro_batches=4,
            tokens=LENGTH,
            squared_tokens=LENGTH**2,
            real_tokens=4 * LENGTH,
            real_squared_tokens=4 * LENGTH**2,
        )
        job = Job(model=model, parallel=ParallelConfig(data=1), precision=PrecisionConfig(fp8=fp8), work=work)
        stage = memory_plan(job).stages[0]
        held = stage.total - stage.context - stage.nccl - stage.fragmentation
        scores = 4 * model.num_attention_heads * LENGTH**2 * 2
        product_seconds.cache_clear()
        with patch.object(h100, "HBM_BYTES_PER_SECOND", H200_BYTES_PER_SECOND):
            predicted = step_time(job).total
        product_seconds.cache_clear()
        precision = "bf16" if fp8 == "none" else f"FP8 {fp8}"
        gib = f"{memory} | {held / 2**30:.2f} | {scores / 2**30:.2f}"
        yield f"| {name} | {precision} | {gib} | {seconds} | {predicted:.3f} |"


def tables() -> dict[str, list[str]]:
    """Every table of the page by name, line by line."""
    return {
        "Table 2": list(table_2()),
        "memory by part": list(parts()),
        "what moves memory and time": list(moves()),
        "products": list(products()),
        "published runs": published_runs.table(),
        "measured": list(measured()),
    }


def main() -> None:
    for name, lines in tables().items():
        print(f"### {name}\n")
        print("\n".join(lines), end="\n\n")


if __name__ == "__main__":
    main()
