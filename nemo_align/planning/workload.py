"""The work of a stage: its steps, and what a step gives to the hardware.

Steps on rows are laid out by the step plan that training uses (data/step_plan.py), so packing, padding and empty
micro-batches are those of the run; steps of pretraining have samples of one length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from nemo_align.config.plan import PlannedStage
from nemo_align.config.stages import PreferenceStageConfig, PretrainStageConfig, TrainStageConfig
from nemo_align.data.batch_schedule import BatchSchedule
from nemo_align.data.step_plan import StepLayout, StepPlan, plan_step, plan_windows
from nemo_align.model.counts import FP8_MULTIPLE, crossover_length
from nemo_align.planning.job import StepWork
from nemo_align.planning.lengths import fitted, read_lengths

_MOST_STEPS, _MOST_EXAMPLES = 32, 16384  # laid out to take the mean of
_ASSUMED = "every row as long as data.sequence_length (name the real ones with lengths=)"


@dataclass(frozen=True)
class Batches:
    """Steps of one batch size."""

    size: int  # examples
    steps: int | None  # None: nobody said how long the stage is


@dataclass(frozen=True)
class StageLength:
    """A stage from its first to its last step."""

    batches: list[Batches]  # in order; several with a batch ramp
    lengths: np.ndarray | None  # int64 [N, segments] of the rows; None for pretraining
    assumption: str | None  # what stands in for something unknown
    overlong: str | None = None  # what becomes of rows that are too long


def segments_of(stage: TrainStageConfig) -> int:
    """Sequences of an example."""
    return 2 if isinstance(stage, PreferenceStageConfig) else 1


def stage_length(planned: PlannedStage) -> StageLength:
    """Batch sizes and steps of the stage.

    Raises:
        ValueError: the file of lengths is wrong, or the stage has none.
    """
    stage, train = planned.stage, planned.stage.train
    if isinstance(stage, PretrainStageConfig):
        if planned.plan.lengths is not None:
            raise ValueError("lengths= is for stages on rows: samples of pretraining all have data.sequence_length")
        known = "data.phases" not in planned.stand_ins
        steps = sum(phase.steps for phase in stage.data.phases.values())
        steps = steps if train.max_steps is None else min(steps, train.max_steps)
        known = known or train.max_steps is not None
        levels = BatchSchedule(train, tokens_per_example=stage.data.sequence_length).levels(steps)
        if not known:
            return StageLength([Batches(train.global_batch_size, None)], None, None)
        return StageLength([Batches(size, count) for size, count in levels], None, None)
    size, segments = train.global_batch_size, segments_of(stage)
    assert stage.data.sequence_length is not None
    if planned.plan.lengths is None:
        lengths = np.full((size, segments), stage.data.sequence_length, dtype=np.int64)
        number, assumption, overlong = stage.dry_run_rows, _ASSUMED, None
    else:
        lengths, overlong = fitted(read_lengths(Path(planned.plan.lengths), segments), stage.data)
        number, assumption = len(lengths), None
    steps = None
    if train.epochs is not None and number is not None:
        steps = -(-max(1, round(train.epochs * number)) // size)
    if train.max_steps is not None and "train.max_steps" not in planned.stand_ins:
        steps = train.max_steps if steps is None else min(steps, train.max_steps)
    return StageLength([Batches(size, steps)], lengths, assumption, overlong)


def step_work(stage: TrainStageConfig, batch_size: int, lengths: np.ndarray | None) -> StepWork:
    """Work of a step of `batch_size` examples under the stage's layout.

    Raises:
        ValueError: an example does not fit a micro-batch.
    """
    parallel, train = stage.parallel, stage.train
    data, length = parallel.data, stage.data.sequence_length
    assert data is not None and length is not None
    pad_to = FP8_MULTIPLE[stage.precision.fp8] * (parallel.tensor if parallel.sequence else 1)
    packing = lengths is not None and train.packing
    longest = length * segments_of(stage)
    capacity = (train.micro_batch_tokens or longest) if packing else longest
    layout = StepLayout(
        capacity=-(-capacity // pad_to) * pad_to,
        data_parallel=data,
        packing=packing,
        micro_batch_size=train.micro_batch_size,
        multiple_of=parallel.pipeline if parallel.virtual_pipeline > 1 else 1,
        pad_to=pad_to,
        fixed_length=True,
        crossover_length=crossover_length(stage.model),
    )
    if lengths is None:
        return _work([plan_windows(range(batch_size), [length] * batch_size, layout)], data, train.micro_batch_size)
    return _work_on_rows(_Rows(lengths), batch_size, layout)


class _Rows:
    """Lengths as the key of a cache: layouts of a search share their micro-batches, and rows may be a million."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rows) and self.lengths is other.lengths

    def __hash__(self) -> int:
        return id(self.lengths)


@lru_cache(maxsize=1024)
def _work_on_rows(rows: _Rows, batch_size: int, layout: StepLayout) -> StepWork:
    """The mean of the first batches of a seeded permutation."""
    options = {name: getattr(layout, name) for name in layout.__dataclass_fields__}
    order = _order(rows, batch_size)
    ones = np.broadcast_to(np.int64(1), len(rows.lengths))
    plans = [
        plan_step(order[start : start + batch_size], rows.lengths, ones, **options)
        for start in range(0, len(order), batch_size)
    ]
    return _work(plans, layout.data_parallel, 1)  # a plan's length is that of the whole micro-batch


@lru_cache(maxsize=16)
def _order(rows: _Rows, batch_size: int) -> np.ndarray:
    """Examples of as many batches as give a mean."""
    number = len(rows.lengths)
    count = max(1, min(_MOST_STEPS, _MOST_EXAMPLES // batch_size, number // batch_size))
    order = np.random.default_rng(0).permutation(number)
    return np.resize(order, count * batch_size)  # a batch larger than the rows goes round


def _work(plans: list[StepPlan], data: int, rows: int) -> StepWork:
    """The mean of planned steps. `rows`: sequences side by side in a micro-batch."""
    counts = tuple(plan.num_micro_batches for plan in plans)
    cells = sum(plan.num_micro_batches for plan in plans) * data
    return StepWork(
        examples=float(np.mean([plan.examples for plan in plans])),
        micro_batches=counts[0] if len(set(counts)) == 1 else float(np.mean(counts)),
        tokens=rows * plans[0].length,
        squared_tokens=sum(plan.padded_squared_tokens for plan in plans) / cells,
        real_tokens=float(np.mean([plan.real_tokens for plan in plans])),
        real_squared_tokens=float(np.mean([plan.squared_tokens for plan in plans])),
        rows=rows,
        counts=counts if len(set(counts)) > 1 else (),
    )
