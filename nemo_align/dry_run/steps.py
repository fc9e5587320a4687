"""The steps of a stage: batches, micro-batches of each rank, and the learning rate."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_align.config.runtime import ParallelConfig
from nemo_align.config.stages import TrainStageConfig
from nemo_align.data.batch_schedule import BatchSchedule
from nemo_align.data.step_plan import StepLayout, StepPlan
from nemo_align.dry_run.findings import Section, number_of_tokens
from nemo_align.training.schedule_length import num_steps, schedule_length


def pretraining_section(
    config: TrainStageConfig, batches: BatchSchedule, num_samples: int, parallel: ParallelConfig
) -> Section:
    """A line for each batch size of the ramp."""
    length = config.data.sequence_length
    lines, consumed, step = [], 0, 1
    for size, steps in batches.levels(batches.steps_for(num_samples)):
        count = size // (config.train.micro_batch_size * parallel.data)
        lines.append(
            f"from step {step:,} ({number_of_tokens(consumed * length)} tokens): {steps:,} steps of {size:,} samples, "
            f"{count} micro-batches of {config.train.micro_batch_size} on each of {parallel.data} replicas"
            f"{_bubble(parallel, count)}"
        )
        consumed, step = consumed + steps * size, step + steps
    total = num_steps(config.train, batches, num_samples)
    lines.append(
        f"{total:,} steps, {num_samples:,} samples of {length:,} tokens: {number_of_tokens(consumed * length)}"
    )
    return Section("steps", [*lines, *_stops_early(config, total, batches.steps_for(num_samples))])


def rows_section(
    config: TrainStageConfig,
    batches: BatchSchedule,
    num_examples: int | None,
    layout: StepLayout,
    parallel: ParallelConfig,
    kind: str,
    sampled: StepPlan | None,
) -> Section:
    """Number of steps where the number of rows is known, and the micro-batches of one of them."""
    size = config.train.global_batch_size
    lines = []
    if num_examples is None:
        lines.append(f"{_epochs(config)} over rows that are not here, {size:,} {kind} a step: set dry_run_rows")
    else:
        total = num_steps(config.train, batches, num_examples)
        epochs = "" if config.train.epochs is None else f", {_epochs(config)}"
        lines.append(f"{total:,} steps of {size:,} {kind}: {num_examples:,} in all{epochs}")
        lines += _stops_early(config, total, batches.steps_for(num_examples))
    if not config.train.packing:
        cuts = -(-size // config.train.micro_batch_size)
        count = _round_up(-(-cuts // layout.data_parallel), layout.multiple_of)
        lines.append(
            f"{count} micro-batches of {config.train.micro_batch_size} on each of {layout.data_parallel} replicas"
            f"{_bubble(parallel, count)}"
        )
    elif sampled is None:
        most = _round_up(-(-size // layout.data_parallel), layout.multiple_of)
        least = layout.multiple_of
        lines.append(
            f"{least} to {most} micro-batches of {layout.capacity:,} tokens on each of {layout.data_parallel} "
            f"replicas, by the lengths of the {kind}{_bubble(parallel, least, 'at most ')}"
        )
    else:
        empty = sum(not members for rank in sampled.micro_batches for members in rank)
        lines.append(
            f"{sampled.num_micro_batches} micro-batches of {layout.capacity:,} tokens on each of "
            f"{layout.data_parallel} replicas{_bubble(parallel, sampled.num_micro_batches)}; {empty} of "
            f"{sampled.num_micro_batches * layout.data_parallel} empty, {_filled(sampled):.0%} of the tokens real"
        )
    if layout.multiple_of > 1:
        lines.append(f"the interleaved schedule takes micro-batches in rounds of {layout.multiple_of}")
    return Section("steps", lines)


def learning_rate_section(
    config: TrainStageConfig, batches: BatchSchedule, num_examples: int | None, marks: Sequence[int] = ()
) -> Section:
    """The schedule in words, and its values as Megatron-core's scheduler gives them, also at the steps `marks`.

    Raises:
        ValueError: warm-up or decay do not fit the stage.
    """
    optimizer = config.optimizer
    lines = [
        f"AdamW, {optimizer.schedule}: lr {optimizer.lr:g}, {optimizer.warmup_steps:,} steps of warm-up, min_lr "
        f"{optimizer.min_lr:g}, weight decay {optimizer.weight_decay:g}, betas {optimizer.beta1:g} and "
        f"{optimizer.beta2:g}, gradients clipped at {optimizer.clip_grad:g}"
    ]
    if num_examples is not None:
        steps = batches.steps_for(num_examples)
        points = sorted({1, min(steps, optimizer.warmup_steps + 1), -(-steps // 2), steps, *marks})
        values = learning_rates(config, batches, num_examples, points)
        spans = [f"step {step:,}: {value:.3g}" for step, value in zip(points, values, strict=True)]
        lines.append(f"spans {steps:,} steps; {', '.join(spans)}")
    return Section("learning rate", lines)


def learning_rates(
    config: TrainStageConfig, batches: BatchSchedule, num_examples: int, steps: list[int]
) -> list[float]:
    """Learning rate of the update of each of `steps` (1 = first)."""
    import torch

    from nemo_align.training.optimizer import build_scheduler

    length = schedule_length(config.optimizer, batches, num_examples)
    values = []
    for step in steps:
        bare = torch.optim.SGD([torch.zeros(1)], lr=0.0)  # only its parameter groups are read
        scheduler = build_scheduler(bare, config.optimizer, length)
        scheduler.step(min(batches.examples_after(step), num_examples))
        values.append(float(bare.param_groups[0]["lr"]))
    return values


def _stops_early(config: TrainStageConfig, total: int, scheduled: int) -> list[str]:
    return [f"stops there by train.max_steps; the schedule spans {scheduled:,}"] if total < scheduled else []


def _epochs(config: TrainStageConfig) -> str:
    return f"{config.train.epochs:g} epoch{'s' * (config.train.epochs != 1)}"


def _bubble(parallel: ParallelConfig, count: int, bound: str = "") -> str:
    """Idle part of the pipeline relative to its work: (pipeline - 1) / (chunks x micro-batches)."""
    if parallel.pipeline == 1:
        return ""
    return f" (bubble {bound}{(parallel.pipeline - 1) / (parallel.virtual_pipeline * count):.1%})"


def _filled(plan: StepPlan) -> float:
    return plan.real_tokens / plan.padded_tokens


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
