"""The plan on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from nemo_align.config.plan import PlannedRecipe
from nemo_align.planning import h100
from nemo_align.planning.estimate import Estimate
from nemo_align.planning.job import Job
from nemo_align.planning.parameters import stage_chunks, stage_parameters, total_parameters
from nemo_align.planning.result import DAY, HOUR, PlanResult, SearchResult
from nemo_align.planning.scaling import ScalingRow
from nemo_align.planning.search import near_sizes
from nemo_align.planning.variants import differing_keys
from nemo_align.planning.workload import StageLength

_WIDTH = 160  # where the output is no terminal
_MEMORY_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer, this rank's shard",
    "fp8_copies": "FP8 copies of weights",
    "activations": "activations in flight",
    "recomputed": "recomputed block",
    "logits_and_loss": "logits and loss",
    "working": "working space, transfers",
    "nccl": "NCCL",
    "context": "CUDA context, libraries",
    "fragmentation": "allocator's fragmentation",
}


def print_plan(result: PlanResult) -> None:
    """The report of a given layout."""
    console = _console()
    main, job = result.main, result.main.job
    console.print(_head(result, job))
    console.print(_parameters(result))
    if result.counted is not None:
        console.print(_comparison(job, result.counted))
    console.print(_memory(main))
    _print_verdict(console, result)
    console.print(_time(main))
    _print_rates(console, result)
    if result.scaling is not None:
        console.print(_scaling("weak scaling: the batch grows with the GPUs", result.scaling.weak))
        console.print(_scaling("strong scaling: the batch stays", result.scaling.strong))
    for note in _notes(result):
        console.print(f"note: {note}", soft_wrap=True)


def print_recipe(planned: PlannedRecipe, results: dict[str, PlanResult]) -> None:
    """A line for each stage of a recipe."""
    console = _console()
    table = _table("stage", "verb", "GPUs", "layout", "batch", "GB", "fits", "step s", "tokens/s/GPU", "MFU", "steps", "time", "GPU-hours", title=planned.experiment)  # fmt: skip  # noqa: E501
    seconds = hours = 0.0
    for name, result in results.items():
        main, total = result.main, result.total
        if total is not None:
            seconds, hours = seconds + total.seconds, hours + total.gpu_hours
        length = ("-", "-", "-")
        if total is not None:
            length = (f"{total.steps:,}", _duration(total.seconds), _hours(total.gpu_hours))
        table.add_row(
            name, result.planned.verb, f"{main.job.world_size:,}", _short_layout(main.job),
            f"{result.length.batches[-1].size:,}", _gigabytes(main.memory.largest.total), main.memory.verdict,
            f"{main.time.total:.3f}", f"{main.tokens_per_second_per_gpu:,.1f}", _percent(main.mfu), *length,
        )  # fmt: skip
    console.print(table)
    unknown = [name for name, result in results.items() if result.total is None]
    console.print(f"together: {_duration(seconds)}, {_hours(hours)} GPU-hours, one stage after the other")
    if unknown:
        console.print(f"note: nobody said how many rows or steps these have: {', '.join(unknown)}", soft_wrap=True)
    if planned.left_out:
        console.print(f"note: left out, nothing is trained there: {', '.join(planned.left_out)}")
    for note in dict.fromkeys(result.length.assumption for result in results.values() if result.length.assumption):
        console.print(f"note: assumed: {note}")
    console.print("note: predicted by docs/plan.md, not measured")


def print_search(result: SearchResult) -> None:
    """The ranked layouts."""
    console, found, options = _console(), result.found, result.planned.plan
    size = result.length.batches[-1].size
    console.print(
        f"{result.planned.verb} of {result.planned.stage.model.name} on {options.gpus:,} GPUs, global batch {size:,}: "
        f"{found.tried:,} layouts can run, {found.fitting:,} of them fit {_gigabytes(h100.CARD_BYTES)} GB"
    )
    if not found.best:
        console.print(_why_none(result))
        return
    table = _table("TP", "PP", "VP", "DP", "micro-batch tokens", "micro-batches", "recompute", "GB", "step s", "tokens/s/GPU", "MFU", "bubble")  # fmt: skip  # noqa: E501
    for estimate in found.best:
        parallel, work = estimate.job.parallel, estimate.job.work
        table.add_row(
            str(parallel.tensor), str(parallel.pipeline), str(parallel.virtual_pipeline), str(estimate.job.data),
            f"{work.tokens:,}", _number(work.micro_batches), parallel.recompute,
            _gigabytes(estimate.memory.largest.total) + (" tight" if estimate.memory.verdict == "tight" else ""),
            f"{estimate.time.total:.3f}",
            f"{estimate.tokens_per_second_per_gpu:,.1f}", _percent(estimate.mfu),
            _percent(estimate.time.bubble_fraction),
        )  # fmt: skip
    console.print(table)
    assert found.first is not None
    overrides = [f"gpus={options.gpus}", *differing_keys(result.planned.stage, found.first)]
    for note in _notes_on_rows(result.length):
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"the first as overrides: {' '.join(overrides)}", soft_wrap=True)


def _why_none(result: SearchResult) -> str:
    """What to change where no layout fits, or none can run."""
    found, gpus = result.found, result.planned.plan.gpus
    assert gpus is not None
    if found.least_bytes is None:
        near = near_sizes(result.planned.stage, gpus)
        sizes = f" {' and '.join(f'gpus={size}' for size in near)} can;" if near else ""
        return f"No layout of {gpus:,} GPUs can share this model and batch:{sizes} or change train.global_batch_size."
    least = _gigabytes(found.least_bytes)
    return f"None fits: the smallest needs {least} GB on its largest rank. Take more GPUs (gpus=)."


def _number(count: float) -> str:
    """A whole number, or a mean of some."""
    return f"{count:,}" if isinstance(count, int) else f"{count:,.1f}"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, file=sys.stdout)


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _head(result: PlanResult, job: Job) -> str:
    precision = job.precision
    numbers = precision.dtype if precision.fp8 == "none" else f"{precision.dtype}, FP8 {precision.fp8}"
    work, size = job.work, result.length.batches[-1].size
    what = f"{result.planned.verb} of {job.model.name} on {job.world_size:,} H100"
    return (
        f"[bold]{what}[/bold]: {_layout(job)}, {numbers}\n"
        f"global batch {size:,}: {_number(work.micro_batches)} micro-batches of {work.tokens:,} tokens on each replica"
    )


def _layout(job: Job) -> str:
    parallel = job.parallel
    layout = f"TP {parallel.tensor}, PP {parallel.pipeline}, VP {parallel.virtual_pipeline}, DP {job.data}"
    layout += ", SP" if parallel.sequence else ""
    return layout + (f", recompute {parallel.recompute}" if parallel.recompute != "none" else "")


def _short_layout(job: Job) -> str:
    parallel = job.parallel
    layout = f"TP{parallel.tensor} PP{parallel.pipeline} VP{parallel.virtual_pipeline} DP{job.data}"
    layout += " SP" if parallel.sequence else ""
    return layout + (f", {parallel.recompute} recompute" if parallel.recompute != "none" else "")


def _parameters(result: PlanResult) -> Table:
    job = result.main.job
    names = ["layers", "embedding", "output", "norms", *(["head"] if job.head else [])]
    if result.counted is not None:
        names = ["built"]
    table = _table("pipeline stage", *names, "total", "chunks")
    table.title = f"\nparameters on each rank; {total_parameters(job.model, job.parallel, job.head):,} in the model"
    for stage in _shown_stages(job):
        sums = stage_parameters(job.model, job.parallel, stage, job.head)
        built = {} if result.counted is None else {"built": sum(result.counted[stage])}
        cells = [f"{built.get(name) or getattr(sums, name):,}" for name in names]
        chunks = [chunk.total for chunk in stage_chunks(job.model, job.parallel, stage, job.head)]
        table.add_row(_stage_name(job, stage), *cells, f"{sums.total:,}", _runs(chunks))
    return table


def _comparison(job: Job, counted: list[list[int]]) -> str:
    """The closed form against the built model, over all stages and chunks."""
    differing = [
        f"stage {stage} chunk {chunk}: {built:,} built, {expected.total:,} expected"
        for stage, chunks in enumerate(counted)
        for chunk, (built, expected) in enumerate(
            zip(chunks, stage_chunks(job.model, job.parallel, stage, job.head), strict=True)
        )
        if built != expected.total
    ]
    number = sum(map(len, counted))
    if differing:
        return f"the built model DIFFERS from the closed form: {'; '.join(differing)}"
    return f"all {number} chunks of {len(counted)} stages, built on the meta device, have the closed form's parameters"


def _memory(estimate: Estimate) -> Table:
    memory = estimate.memory
    stages = sorted({*_shown_stages(estimate.job), memory.largest_stage})
    table = _table(
        f"\nmemory of a GPU, GB of {_gigabytes(memory.card)}", *(_stage_name(estimate.job, s) for s in stages)
    )
    for name, label in _MEMORY_NAMES.items():
        values = [getattr(memory.stages[stage], name) for stage in stages]
        if any(values):
            if name == "activations":
                label += f" ({', '.join(str(memory.in_flight[stage]) for stage in stages)} chunks)"
            table.add_row(label, *(_gigabytes(value) for value in values))
    table.add_row("[bold]total[/bold]", *(f"[bold]{_gigabytes(memory.stages[stage].total)}[/bold]" for stage in stages))
    return table


def _print_verdict(console: Console, result: PlanResult) -> None:
    memory = result.main.memory
    largest = f"{_gigabytes(memory.largest.total)} GB on the largest rank (stage {memory.largest_stage})"
    style = {"fits": "green", "tight": "yellow", "does not fit": "red"}[memory.verdict]
    said = {"fits": "fits on 80 GB", "tight": "fits on 80 GB, but tight", "does not fit": "does NOT fit on 80 GB"}
    console.print(f"[{style}]{said[memory.verdict]}[/{style}]: {largest}, the card has {_gigabytes(memory.card)}")
    chunks = result.main.job.parallel.virtual_pipeline
    console.print(
        f"activations of one micro-batch: {_gigabytes(memory.activations_per_micro_batch)} GB on a stage"
        f"{f', in {chunks} chunks' if chunks > 1 else ''}"
    )
    if memory.reference_pass is not None:
        console.print(
            f"reference pass before training: {_gigabytes(memory.reference_pass)} GB (the same weights, no gradients "
            "or optimizer yet, no second model)"
        )
    if memory.fits:
        return
    if not result.changes:
        console.print("no one or two keys make it fit: see search=true with more GPUs")
        return
    table = _table("nearest changes that make it fit", "GPUs", "GB", "step s", "tokens/s/GPU", "MFU")
    for change in result.changes:
        found = change.estimate
        table.add_row(
            " ".join(change.overrides), f"{found.job.world_size:,}", _gigabytes(found.memory.largest.total),
            f"{found.time.total:.3f}", f"{found.tokens_per_second_per_gpu:,.1f}", _percent(found.mfu),
        )  # fmt: skip
    console.print(table)


def _time(estimate: Estimate) -> Table:
    time = estimate.time
    table = _table("\ntime of a step", "seconds", "of the step")
    rows = (
        ("matrix products", time.products),
        ("attention", time.attention),
        ("memory-bound kernels", time.memory),
        ("tensor-parallel communication, exposed", time.tensor),
        ("GPU waits for the host", time.host),
        ("pipeline bubble, transfers, waiting", time.waiting),
        ("gradient reduction, exposed", time.gradient_reduce),
        ("parameter gather, exposed", time.parameter_gather),
        ("optimizer", time.optimizer),
        ("host work of a step", time.step_host),
    )
    for label, seconds in rows:
        if seconds > 0:
            table.add_row(label, f"{seconds:.3f}", _percent(seconds / time.total))
    table.add_row("[bold]step[/bold]", f"[bold]{time.total:.3f}[/bold]", "")
    if estimate.job.parallel.pipeline > 1:
        table.add_row(
            "of it by transfers between stages", f"{time.transfers:.3f}", _percent(time.transfers / time.total)
        )
        table.add_row("of it by uneven stages (embedding, output)", f"{time.imbalance:.3f}", _percent(time.imbalance / time.total))  # fmt: skip  # noqa: E501
    if time.recomputed > 0:
        table.add_row("of it by recomputation", f"{time.recomputed:.3f}", _percent(time.recomputed / time.total))
    return table


def _print_rates(console: Console, result: PlanResult) -> None:
    main = result.main
    console.print(
        f"{main.tokens_per_second_per_gpu:,.1f} tokens/s/GPU, {main.model_tflops_per_gpu:,.0f} model TFLOP/s/GPU; "
        f"MFU {_percent(main.mfu)} (attention in full, as the report) or {_percent(main.mfu_causal)} (halved, as "
        f"Megatron-LM) of {main.peak_tflops:,.0f} TFLOP/s; padding {_percent(main.padding_fraction)}",
        soft_wrap=True,
    )
    if len(result.estimates) > 1:
        table = _table("\nglobal batch", "steps", "micro-batches", "step s", "MFU", "days")
        for batches, estimate in zip(result.length.batches, result.estimates, strict=True):
            assert batches.steps is not None
            days = batches.steps * estimate.time.total / DAY
            table.add_row(
                f"{batches.size:,}", f"{batches.steps:,}", _number(estimate.job.work.micro_batches),
                f"{estimate.time.total:.3f}", _percent(estimate.mfu), f"{days:,.2f}",
            )  # fmt: skip
        console.print(table)
    if result.total is not None:
        total = result.total
        reference = (
            f", {_duration(total.reference_seconds)} of it the reference pass" if total.reference_seconds else ""
        )
        console.print(
            f"the stage: {total.steps:,} steps, {total.tokens:,.0f} tokens, {_duration(total.seconds)}{reference}, "
            f"{_hours(total.gpu_hours)} GPU-hours"
        )
    else:
        day = main.tokens_per_second_per_gpu * main.job.world_size * DAY
        console.print(f"a day: {day / 1e9:,.2f} billion tokens, {DAY / main.time.total:,.0f} steps")
    cost = result.checkpoint
    console.print(
        f"checkpoint: {cost.num_bytes / 1e9:,.1f} GB, {_duration(cost.seconds)} at "
        f"{cost.bytes_per_second / 1e9:,.1f} GB/s; a time limit has to be announced "
        f"{result.signal_lead_seconds} seconds before (cluster.signal_lead_seconds)",
        soft_wrap=True,
    )


def _scaling(title: str, rows: Iterable[ScalingRow]) -> Table:
    table = _table("GPUs", "global batch", "micro-batches", "GB", "step s", "million tokens/s", "MFU", "efficiency")
    table.title = f"\n{title}"
    first: float | None = None
    for row in rows:
        if row.estimate is None:
            table.add_row(f"{row.gpus:,}", f"{row.batch_size:,}", "-", "-", "-", "-", "-", "-")
            continue
        found = row.estimate
        first = first or found.tokens_per_second_per_gpu
        fits = "" if found.memory.fits else " (does not fit)"
        table.add_row(
            f"{row.gpus:,}", f"{row.batch_size:,}", _number(found.job.work.micro_batches),
            f"{_gigabytes(found.memory.largest.total)}{fits}", f"{found.time.total:.3f}",
            f"{row.gpus * found.tokens_per_second_per_gpu / 1e6:,.3f}", _percent(found.mfu),
            _percent(found.tokens_per_second_per_gpu / first),
        )  # fmt: skip
    return table


def _notes_on_rows(length: StageLength) -> Iterable[str]:
    if length.assumption is not None:
        yield f"assumed: {length.assumption}"
    if length.overlong is not None:
        yield length.overlong


def _notes(result: PlanResult) -> Iterable[str]:
    yield from _notes_on_rows(result.length)
    if not result.planned.is_sized:
        yield "one replica: set gpus= or parallel.data= for more"
    if result.main.job.precision.dtype == "fp32":
        yield "fp32 products without TF32, as Megatron-core runs them"
    yield "predicted by docs/plan.md, not measured"


def _shown_stages(job: Job) -> list[int]:
    """First, a middle one and the last: the others are like the middle one, or between."""
    pipeline = job.parallel.pipeline
    return sorted({0, pipeline // 2, pipeline - 1})


def _stage_name(job: Job, stage: int) -> str:
    return f"stage {stage} of {job.parallel.pipeline}" if job.parallel.pipeline > 1 else "every rank"


def _runs(values: list[int]) -> str:
    """`3 x 5, 7` of [5, 5, 5, 7]."""
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][1] == value:
            runs[-1][0] += 1
        else:
            runs.append([1, value])
    return ", ".join(f"{count} x {value:,}" if count > 1 else f"{value:,}" for count, value in runs)


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f}" if num_bytes < 1e10 else f"{num_bytes / 1e9:,.1f}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2f}"


def _duration(seconds: float) -> str:
    if seconds >= 2 * DAY:
        return f"{seconds / DAY:,.1f} days"
    if seconds >= 2 * HOUR:
        return f"{seconds / HOUR:,.1f} hours"
    if seconds >= 180:
        return f"{seconds / 60:,.1f} minutes"
    return f"{seconds:,.1f} seconds"
