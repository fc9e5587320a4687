"""What a stage hands to the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from nemo_align.config.objectives import RewardConfig
from nemo_align.data.source import StepSource
from nemo_align.data.tokenizer import Tokenizer
from nemo_align.training.forward_totals import ForwardTotals
from nemo_align.training.schedule_step import Objective

# Per-example outputs of a whole held-out set ("index" and the objective's names) -> metrics that are no plain means.
SetMetrics = Callable[[Mapping[str, np.ndarray], StepSource], dict[str, float]]


@dataclass(kw_only=True)
class Task:
    """One stage: which data, which objective. The loop asks for nothing else."""

    verb: str
    tokenizer: Tokenizer
    objective: Objective
    train: StepSource
    validation: dict[str, StepSource] = field(default_factory=dict)
    set_metrics: SetMetrics | None = None
    reward: RewardConfig | None = None  # set for models with a reward head
    computes_logits: bool = True  # the output projection counts in FLOPs
    forward_only: dict[str, ForwardTotals] = field(default_factory=dict)  # passes done before training, by name
