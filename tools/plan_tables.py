"""The tables of docs/plan.md and the figures in its sentences, from the plan's own code.

    python tools/plan_tables.py

A test compares all of them with the page, so the page cannot go stale.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from bench import published_runs

from nemo_align.config.model import ModelConfig
from nemo_align.config.model_file import read_model
from nemo_align.config.plan_stage import compose_plan
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.planning import activations
from nemo_align.planning.activations import layer_bytes
from nemo_align.planning.estimate import Estimate, estimate
from nemo_align.planning.fit import stage_memory
from nemo_align.planning.job import Job, StepWork
from nemo_align.planning.layer_time import layer, output
from nemo_align.planning.memory import StageMemory, memory_plan
from nemo_align.planning.products import efficiency, product_seconds
from nemo_align.planning.scaling import ScalingRow, scaling
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
    *, gpus: int = GPUS, batch: int = BATCH, rows: int = 1, fp8: str = "none", attention: str = "auto", **layout: Any
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
        precision=PrecisionConfig(fp8=fp8, attention=attention),
        work=work,
    )
    return Estimate(job, memory_plan(job), step_time(job))


# What changes, and to what. The number of GPUs and the batch stay, so DP follows.
MOVES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "TP": [("TP 2", {"tensor": 2}), ("TP 4", {"tensor": 4}), ("TP 8", {})],
    "PP": [(f"PP {p}, VP {96 // p}", {"pipeline": p, "virtual_pipeline": 96 // p}) for p in (4, 6, 8, 12, 16, 24, 48)],
    "VP": [(f"VP {v}", {"virtual_pipeline": v}) for v in (1, 2, 4, 8)],
    "recompute": [(name, {"recompute": name}) for name in ("none", "selective", "full")]
    + [
        (f"VP 1, {name}", {"virtual_pipeline": 1, "recompute": recompute, "recompute_layers": layers})
        for name, recompute, layers in (("none", "none", 1), ("block of 4", "block", 4), ("full", "full", 1))
    ],
    "attention": [("flash or fused", {}), ("unfused", {"attention": "unfused"})],
    "micro-batch": [(f"micro-batch of {rows}", {"rows": rows}) for rows in (1, 2, 4)],
    "sequence parallel": [("on", {}), ("off", {"sequence": False})],
    "precision": [("bf16", {})] + [(f"FP8 {name}", {"fp8": name}) for name in ("delayed", "tensorwise", "blockwise")],
    "overlap": [
        ("gradients only", {}),
        ("nothing", {"overlap_grad_reduce": False}),
        ("gradients and parameters", {"overlap_param_gather": True}),
        ("gradients, no transfers", {"overlap_p2p": False}),
        ("tensor parallel too", {"overlap_param_gather": True, "overlap_tensor": True}),
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


def papers() -> Iterator[str]:
    """What Megatron's papers say of a layout beside what the plan says of the 340B."""
    yield "| | source | paper | plan |"
    yield "|---|---|---|---|"
    for pipeline, virtual, rows in ((12, 1, 1), (12, 2, 1), (12, 4, 1), (12, 8, 1), (8, 12, 1), (24, 4, 1), (12, 8, 4)):
        found = planned(pipeline=pipeline, virtual_pipeline=virtual, rows=rows)
        count = virtual * found.job.work.micro_batches
        bubble = (pipeline - 1) / (count + pipeline - 1)
        what = f"PP {pipeline}, VP {virtual}, micro-batch of {rows}: bubble, of the pipeline's time"
        shown = f"(p - 1) / (v m + p - 1) = {100 * bubble:.1f} % | {100 * found.time.bubble_fraction:.1f} %"
        yield f"| {what} | 2104.04473, 2.2 | {shown} |"
    plain = planned(virtual_pipeline=1)
    for virtual in (2, 4, 8):
        factor = 1 + 11 / (12 * virtual)
        more = planned(virtual_pipeline=virtual).memory.stages[0].activations / plain.memory.stages[0].activations
        what = f"VP {virtual}: activations of the first stage, times those of VP 1"
        yield f"| {what} | 2205.05198, 4.2.3 | 1 + (p - 1) / (p v) = {factor:.2f} | {more:.2f} |"
    faster = plain.time.total / planned().time.total - 1
    yield f"| VP 8 against VP 1: faster by | 2104.04473, abstract | more than 10 % | {100 * faster:.0f} % |"
    slower = planned(recompute="full").time.total / planned().time.total - 1
    yield f"| full recomputation: slower by | 2205.05198, 1 | 30 to 40 % | {100 * slower:.0f} % |"
    parted = layer_bytes(planned(sequence=False).job) / layer_bytes(planned().job)
    what = "sequence parallelism at TP 8: a layer's activations, without it over with it"
    yield f"| {what} | 2205.05198, Table 2 | (10 + 24 / t) / (34 / t) = {(10 + 24 / 8) / (34 / 8):.2f} | {parted:.2f} |"


def scaling_tables() -> dict[str, list[str]]:
    """scaling=true of the 340B: the batch of the report's first row a replica (weak), and in all (strong)."""
    layout = ["model=nemotron4_340b", "parallel=tp8_pp12", f"gpus={GPUS}", f"train.global_batch_size={BATCH}"]
    found = scaling(compose_plan(layout).stage, BATCH, None)
    heads = ("GPUs", "global batch", "micro-batches", "GB", "step, s", "million tokens/s", "MFU", "efficiency")
    return {f"scaling, {kind}": _scaling(heads, getattr(found, kind)) for kind in ("weak", "strong")}


def _scaling(heads: Sequence[str], rows: Sequence[ScalingRow]) -> list[str]:
    lines, first = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"], None
    for row in rows:
        if row.estimate is None:
            lines.append(f"| {row.gpus:,} | {row.batch_size:,} |{' - |' * (len(heads) - 2)}")
            continue
        found = row.estimate
        rate = found.tokens_per_second_per_gpu
        first = first or rate
        memory = f"{found.memory.largest.total / 1e9:.1f}{'' if found.memory.fits else ', does not fit'}"
        lines.append(
            f"| {row.gpus:,} | {row.batch_size:,} | {found.job.work.micro_batches:,} | {memory} "
            f"| {found.time.total:.2f} | {row.gpus * rate / 1e6:.3f} | {100 * found.mfu:.1f} % "
            f"| {100 * rate / first:.1f} % |"
        )
    return lines


def statements() -> Iterator[str]:
    """Figures in the page's sentences, as they stand there."""
    job = planned().job
    last, inner = output(job), layer(job, fp8=False, recomputed=False)
    layers = (last.forward.total + last.backward.total) / (inner.forward.total + inner.backward.total)
    yield f"the output projection is worth {layers:.1f} layers of the 340B"
    added = product_seconds(9216, 18432, LENGTH, "bf16", 8) / product_seconds(9216, 18432, LENGTH, "bf16") - 1
    yield f"with 4,096 tokens in a micro-batch that is {100 * added:.0f} % of that product"
    slower = planned(recompute="full").time.total / planned().time.total - 1
    yield f"about {100 * slower:.0f} % more time"
    vp4, vp8 = planned(virtual_pipeline=4), planned()
    yield f"With VP 4 the plan gives {100 * vp4.mfu:.1f} % in its first row, with VP 8 {100 * vp8.mfu:.1f} %"
    nvidia = next(run for run in published_runs.RUNS if run.source == published_runs.DGXC)
    yield f"where the plan gives {published_runs.predict(nvidia).memory.largest.total / 1e9:.0f} GB for its layout"
    errors = {row["run"]: row["error_percent"] for row in map(published_runs.compare, published_runs.RUNS)}
    yield f"the 1.7B is predicted {-errors['1.7B, 48 GPUs']:.0f} % too fast"
    worst = min(error for name, error in errors.items() if "FP8" in name)
    yield f"is predicted up to {-worst:.0f} % too fast"
    largest = planned().memory.largest
    assumed = largest.nccl + largest.context + largest.fragmentation
    yield f"are assumptions, about {assumed / 1e9:.0f} GB together"
    late = {key: seconds / one_gpu(*key)[1] - 1 for key, (seconds, _) in MEASURED.items()}
    bf16 = [error for (_, what), error in late.items() if "bf16" in what and "unfused" not in what]
    yield f"bf16 steps took up to {100 * max(bf16):.0f} % longer than planned"
    in_fp8 = [error for (_, what), error in late.items() if "FP8" in what]
    yield f"FP8 steps {100 * min(in_fp8):.0f} to {100 * max(in_fp8):.0f} %"
    sizes = {key: one_gpu(*key)[0].tensors / 2**30 / gib - 1 for key, (_, gib) in MEASURED.items()}
    yield f"Memory is the plan's within {100 * max(map(abs, sizes.values())):.1f} %"


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


# tools/bench/gpu_training.py on one H100 SXM (torch 2.11, Transformer Engine 2.20, no Apex): seconds of a step, and GiB
# that tensors held at most. Four layers, 16,384 tokens in a step. (model, what is changed) of `one_gpu`.
MEASURED: dict[tuple[str, str], tuple[float, float]] = {
    ("340b_rank", "bf16"): (0.388, 37.85),
    ("340b_rank", "bf16, micro-batch of 2"): (0.367, 41.42),
    ("340b_rank", "bf16, 2 layers recomputed"): (0.431, 36.65),
    ("340b_rank", "bf16, all layers recomputed"): (0.478, 35.96),
    ("340b_rank", "bf16, unfused attention"): (0.409, 39.48),
    ("340b_rank", "FP8 delayed"): (0.287, 40.41),
    ("340b_rank", "FP8 tensorwise"): (0.341, 39.11),
    ("340b_rank", "FP8 blockwise"): (0.317, 40.39),
    ("15b", "bf16"): (0.338, 31.15),
    ("15b", "FP8 delayed"): (0.246, 33.63),
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


def measured() -> Iterator[str]:
    """The plan beside what ran on one H100."""
    heads = ("model, 4 layers", "what", "GiB, measured", "GiB, plan", "off by", "step, s, measured", "step, s, plan")
    yield f"| {' | '.join((*heads, 'off by'))} |"
    yield "|---|---|---|---|---|---|---|---|"
    for (name, what), (seconds, gib) in MEASURED.items():
        memory, planned_seconds = one_gpu(name, what)
        planned_gib = memory.tensors / 2**30
        sizes = f"{gib:.2f} | {planned_gib:.2f} | {100 * (planned_gib / gib - 1):+.1f} %"
        times = f"{seconds} | {planned_seconds:.3f} | {100 * (planned_seconds / seconds - 1):+.1f} %"
        yield f"| {name} | {what} | {sizes} | {times} |"


def one_gpu(name: str, what: str) -> tuple[StageMemory, float]:
    """Memory, and seconds of a step, of what ran on one H100."""
    model = ModelConfig(name=name, num_layers=4, vocab_size=8192, **MEASURED_MODELS[name])
    rows = 2 if "micro-batch of 2" in what else 1
    work = StepWork(
        examples=4,
        micro_batches=4 // rows,
        tokens=rows * LENGTH,
        squared_tokens=rows * LENGTH**2,
        real_tokens=4 * LENGTH,
        real_squared_tokens=4 * LENGTH**2,
        rows=rows,
    )
    parallel = ParallelConfig(data=1)
    if "recomputed" in what:
        parallel = replace(parallel, recompute="full" if "all" in what else "block")
        parallel = replace(parallel, recompute_layers=1 if "all" in what else 2)
    fp8 = what.removeprefix("FP8 ") if what.startswith("FP8") else "none"
    attention = "unfused" if "unfused" in what else "auto"
    job = Job(model=model, parallel=parallel, precision=PrecisionConfig(fp8=fp8, attention=attention), work=work)
    return memory_plan(job).stages[0], step_time(job).total


ALIGNMENT = {
    "as in the recipe": [],
    "VP 1, none recomputed": ["parallel.virtual_pipeline=1", "parallel.recompute=none"],
    "VP 8, none recomputed": ["parallel.recompute=none"],
    "the same, gradients in bf16": ["parallel.recompute=none", "precision.grad_reduce_fp32=false"],
    "PP 6, VP 16, DP 4": ["parallel.pipeline=6", "parallel.virtual_pipeline=16", "parallel.data=4"],
}


def alignment() -> Iterator[str]:
    """The 340B's Code SFT and DPO on 192 GPUs by what lengths the rows have; layouts that fit."""
    yield "| stage | mean tokens | layout | micro-batches | padding | GB, largest rank | verdict | step, s |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, segments in (("code_sft", 1), ("dpo", 2)):
        for mean in (250, 650, 1300):
            lengths = _lengths(mean, segments)
            for label, overrides in ALIGNMENT.items():
                stage = compose_plan([f"+experiment=nemotron4_340b/{name}", *overrides]).stage
                found = estimate(stage, stage.train.global_batch_size, lengths)
                count, memory = found.job.work.micro_batches, found.memory
                if memory.fits:
                    yield (
                        f"| {name} | {mean:,} | {label} | {count:.1f} | {100 * found.padding_fraction:.0f} % "
                        f"| {memory.largest.total / 1e9:.1f} | {memory.verdict} | {found.time.total:.2f} |"
                    )


def _lengths(mean: int, segments: int) -> np.ndarray:
    """[6000, segments] of a log-normal distribution, cut at 4,096 tokens; those of a pair are alike."""
    random = np.random.default_rng(1)
    spread, within = 0.8, 0.3
    rows = random.lognormal(np.log(mean) - spread**2 / 2, spread, (6000, 1))
    rows = rows * np.exp(random.normal(0.0, within, (6000, segments))) if segments > 1 else rows
    return np.clip(rows, 16, LENGTH).astype(np.int64)


# tests/distributed/test_planned_memory.py, which runs them: MB of tensors on ranks 0 and 1 at most.
QUICKSTART_MEASURED = {
    "pretrain": (74.4, 74.5),
    "code_sft": (65.5, 65.4),
    "reward": (64.4, 30.6),
    "dpo": (63.7, 63.7),
    "rpo_3": (74.8, 88.5),
}
CPU_LOSS_CHUNK_TOKENS = 32  # of objectives/log_probs.py; the plan has a GPU's


def quickstart() -> Iterator[str]:
    """Memory of the quickstart's stages on a CPU, measured and planned."""
    yield "| stage | layout | rank | MB, measured | MB, plan | off by |"
    yield "|---|---|---|---|---|---|"
    for name, measured in QUICKSTART_MEASURED.items():
        stage = compose_plan([f"+experiment=quickstart/{name}"]).stage
        with patch.object(activations, "LOSS_CHUNK_TOKENS", CPU_LOSS_CHUNK_TOKENS):
            stages = stage_memory(stage).stages
        parallel = stage.parallel
        layout = f"TP {parallel.tensor}, PP {parallel.pipeline}, VP {parallel.virtual_pipeline}, DP {parallel.data}"
        for rank, megabytes in enumerate(measured):
            planned = stages[rank % len(stages)].tensors / 1e6
            off = f"{100 * (planned / megabytes - 1):+.1f} %"
            yield f"| {name} | {layout} | {rank} | {megabytes} | {planned:.1f} | {off} |"


def tables() -> dict[str, list[str]]:
    """Every table of the page by name, line by line."""
    return {
        "Table 2": list(table_2()),
        "memory by part": list(parts()),
        "what moves memory and time": list(moves()),
        "alignment": list(alignment()),
        "products": list(products()),
        "published runs": published_runs.table(),
        "measured": list(measured()),
        "quickstart": list(quickstart()),
        "papers": list(papers()),
        **scaling_tables(),
    }


def main() -> None:
    for name, lines in tables().items():
        print(f"### {name}\n")
        print("\n".join(lines), end="\n\n")
    print("### in sentences\n", *statements(), sep="\n")


if __name__ == "__main__":
    main()
