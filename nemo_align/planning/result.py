"""All that one call of `plan` found out, before it is printed or written."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_align.config.plan import PlannedStage
from nemo_align.planning.advice import Change
from nemo_align.planning.estimate import CheckpointCost, Estimate, checkpoint_cost, forward_seconds
from nemo_align.planning.scaling import Scaling
from nemo_align.planning.search import Found
from nemo_align.planning.workload import StageLength
from nemo_align.runtime.signal_lead import needed_seconds

DAY, HOUR = 86400.0, 3600.0


@dataclass(frozen=True)
class StageTotal:
    """The whole stage. Steps of several batch sizes take different times."""

    steps: int
    examples: float
    tokens: float  # real ones
    train_seconds: float
    reference_seconds: float  # of the forward-only pass before a preference stage
    gpus: int

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.reference_seconds

    @property
    def gpu_hours(self) -> float:
        return self.seconds / HOUR * self.gpus


@dataclass(frozen=True)
class PlanResult:
    """Of a given layout. `estimates`: one per batch size of the stage, in order; the last is the one shown in full."""

    planned: PlannedStage
    length: StageLength
    estimates: list[Estimate]
    total: StageTotal | None  # None: nobody said how long the stage is
    checkpoint: CheckpointCost
    changes: list[Change]  # that make it fit, if it does not
    counted: list[list[int]] | None  # exact=true: parameters of the real model, [stage][chunk]
    scaling: Scaling | None

    @property
    def main(self) -> Estimate:
        return self.estimates[-1]

    @property
    def signal_lead_seconds(self) -> int:
        """How long before a time limit a job has to be told: cluster.signal_lead_seconds."""
        longest = max(estimate.time.total for estimate in self.estimates)
        asynchronous = self.planned.stage.checkpoint.asynchronous
        return needed_seconds(longest, self.checkpoint.seconds, asynchronous=asynchronous)


@dataclass(frozen=True)
class SearchResult:
    """Of search=true."""

    planned: PlannedStage
    length: StageLength
    found: Found


def stage_total(planned: PlannedStage, length: StageLength, estimates: list[Estimate]) -> StageTotal | None:
    """Sum over the stage's batch sizes."""
    steps = examples = 0
    tokens = seconds = 0.0
    for batches, estimate in zip(length.batches, estimates, strict=True):
        if batches.steps is None:
            return None
        steps += batches.steps
        examples += batches.steps * batches.size
        tokens += batches.steps * estimate.job.work.real_tokens
        seconds += batches.steps * estimate.time.total
    reference = 0.0
    if planned.verb == "preference":
        epochs = planned.stage.train.epochs or 1.0
        rows = len(length.lengths) if planned.plan.lengths and length.lengths is not None else examples / epochs
        reference = forward_seconds(estimates[-1], round(rows))
    return StageTotal(steps, examples, tokens, seconds, reference, estimates[-1].job.world_size)


def cost_of_checkpoints(planned: PlannedStage, estimate: Estimate) -> CheckpointCost:
    rate = planned.plan.write_gb_per_second
    return checkpoint_cost(estimate.job, None if rate is None else rate * 1e9)
