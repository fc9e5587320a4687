"""What forward-only passes computed, for their throughput."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_align.data.step_plan import StepPlan


class Stopped(Exception):
    """A stop signal reached this run outside of a training step."""


@dataclass
class ForwardTotals:
    """Sums over the steps of forward-only passes of one kind."""

    seconds: float = 0.0
    tokens: int = 0
    squared_tokens: int = 0
    padded_tokens: int = 0
    padded_squared_tokens: int = 0

    def add(self, plan: StepPlan, seconds: float) -> None:
        self.seconds += seconds
        self.tokens += plan.real_tokens
        self.squared_tokens += plan.squared_tokens
        self.padded_tokens += plan.padded_tokens
        self.padded_squared_tokens += plan.padded_squared_tokens
