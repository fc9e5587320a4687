"""Length of the learning-rate schedule of a stage, from its steps and batches. No torch: a dry run asks too."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_align.config.training import OptimizerConfig, TrainConfig
from nemo_align.data.batch_schedule import BatchSchedule


@dataclass(frozen=True)
class ScheduleLength:
    """Length of the learning-rate schedule, in examples, so that it does not depend on how a ramp cuts batches."""

    warmup: int
    decay: int  # from the first example to the end of the decay
    wsd_decay: int | None = None  # length of the final decay of `wsd`


def schedule_length(optimizer: OptimizerConfig, batches: BatchSchedule, num_examples: int) -> ScheduleLength:
    """The schedule of a stage that spans `num_examples` examples.

    Raises:
        ValueError: warm-up, or warm-up and decay, do not fit the stage's steps.
    """
    steps = batches.steps_for(num_examples)
    if optimizer.warmup_steps >= steps:
        raise ValueError(f"optimizer.warmup_steps={optimizer.warmup_steps}, but the stage has {steps} steps: lower it")
    warmup = batches.examples_after(optimizer.warmup_steps)
    if optimizer.schedule == "wsd":
        assert optimizer.decay_steps is not None, "validated"
        if optimizer.warmup_steps + optimizer.decay_steps > steps:
            raise ValueError(
                f"optimizer.warmup_steps={optimizer.warmup_steps} and decay_steps={optimizer.decay_steps} do not "
                f"fit the stage's {steps} steps: lower one"
            )
        # The decay ends with the stage; its length is that of the stage's last batches.
        begin = batches.examples_after(steps - optimizer.decay_steps)
        return ScheduleLength(warmup=warmup, decay=num_examples, wsd_decay=num_examples - begin)
    if optimizer.decay_steps is not None:
        return ScheduleLength(warmup=warmup, decay=batches.examples_after(optimizer.decay_steps))
    return ScheduleLength(warmup=warmup, decay=num_examples)


def num_steps(train: TrainConfig, batches: BatchSchedule, num_examples: int) -> int:
    """Steps that a run takes: those of the schedule, or `train.max_steps` if it stops before."""
    steps = batches.steps_for(num_examples)
    return steps if train.max_steps is None else min(steps, train.max_steps)
