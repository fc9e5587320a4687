"""A layout on more and more GPUs: replicas added, with the batch growing (weak) or fixed (strong)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nemo_align.config.stages import TrainStageConfig
from nemo_align.planning.estimate import Estimate, estimate
from nemo_align.planning.variants import problems, variant

SIZES = 9  # doublings from one replica on: 96 GPUs a replica give 96 to 24,576


@dataclass(frozen=True)
class ScalingRow:
    """One number of GPUs."""

    gpus: int
    batch_size: int
    estimate: Estimate | None  # None: the batch cannot be shared by so many replicas


@dataclass(frozen=True)
class Scaling:
    weak: list[ScalingRow]
    strong: list[ScalingRow]


def scaling(stage: TrainStageConfig, batch_size: int, lengths: np.ndarray | None) -> Scaling:
    """Weak: `batch_size` is that of the stage's own number of replicas and grows with theirs. Strong: it stays."""
    own = stage.parallel.data
    assert own is not None
    cell = stage.parallel.tensor * stage.parallel.pipeline
    replicas = sorted({2**power for power in range(SIZES)} | {own})

    def row(data: int, size: int) -> ScalingRow:
        changed = variant(stage, parallel__data=data, train__global_batch_size=size, train__batch_ramp=[])
        found = None
        if size >= data and not problems(changed):
            found = estimate(changed, size, lengths)
        return ScalingRow(cell * data, size, found)

    weak = [row(data, batch_size * data // own) for data in replicas if batch_size * data % own == 0]
    return Scaling(weak, [row(data, batch_size) for data in replicas])
