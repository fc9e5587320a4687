"""Whether a stage fits on its GPUs, and what would make it fit: the question of the plan that a job asks first."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_align.config.plan import PlannedStage
from nemo_align.config.stages import ScoreStageConfig, TrainStageConfig, WorkerConfig
from nemo_align.planning import h100
from nemo_align.planning.advice import changes_that_fit
from nemo_align.planning.estimate import job_of
from nemo_align.planning.job import Job, StepWork
from nemo_align.planning.memory import TIGHT_FRACTION, MemoryPlan, forward_only_bytes, memory_plan
from nemo_align.planning.parameters import RewardHeadSize
from nemo_align.planning.workload import stage_length

_MOST_CHANGES = 3


@dataclass(frozen=True)
class Fit:
    """Bytes of the largest rank against those of its GPU."""

    needed: float
    card: float
    stage: int  # pipeline stage of that rank
    changes: list[str]  # overrides under which it fits, the nearest first; none if it fits, or if no two keys do

    @property
    def verdict(self) -> str:
        """fits | tight | does not fit."""
        if self.needed > self.card:
            return "does not fit"
        return "tight" if self.needed > (1 - TIGHT_FRACTION) * self.card else "fits"


def fit(config: WorkerConfig, card: float) -> Fit:
    """Memory of a stage whose `parallel.data` is set, on GPUs of `card` bytes. Rows are taken to be full.

    Raises:
        ValueError: an example does not fit a micro-batch.
    """
    if isinstance(config, ScoreStageConfig):
        sizes = forward_only_bytes(_scoring(config))
        stage = max(range(len(sizes)), key=sizes.__getitem__)
        return Fit(sizes[stage], card, stage, [])
    assert isinstance(config, TrainStageConfig)
    memory = stage_memory(config, card)
    found = Fit(memory.largest.total, card, memory.largest_stage, [])
    if found.verdict == "fits":
        return found
    roomy = (1 - TIGHT_FRACTION) * card  # what the model of memory may be wrong by stays free
    length = stage_length(PlannedStage(stage=config))
    changes = changes_that_fit(config, length.batches[-1].size, length.lengths, card=roomy)
    return Fit(found.needed, card, found.stage, [" ".join(change.overrides) for change in changes[:_MOST_CHANGES]])


def stage_memory(config: TrainStageConfig, card: float = h100.CARD_BYTES) -> MemoryPlan:
    """Memory of a training stage whose `parallel.data` is set, at its last batch size and with full rows."""
    length = stage_length(PlannedStage(stage=config))
    job = job_of(config, length.batches[-1].size, length.lengths)
    return memory_plan(job, card=card)


def _scoring(config: ScoreStageConfig) -> Job:
    """One micro-batch of a reward model."""
    tokens = config.micro_batch_tokens or config.data.sequence_length
    assert tokens is not None
    work = StepWork(
        examples=1,
        micro_batches=1,
        tokens=tokens,
        squared_tokens=tokens**2,
        real_tokens=tokens,
        real_squared_tokens=tokens**2,
    )
    head = RewardHeadSize(attributes=len(config.weights or [1]), bias=True)  # a few values beside the layers
    return Job(model=config.model, parallel=config.parallel, precision=config.precision, work=work, head=head)
