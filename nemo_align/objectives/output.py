"""What an objective returns for one micro-batch: sums and counts, never means."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(kw_only=True)
class ObjectiveOutput:
    """Sums over one micro-batch. Means are taken once, over all micro-batches and ranks of the step, so the split into
    micro-batches never shows in the result."""

    loss: Tensor  # scalar, attached to the graph: SUM over the micro-batch
    count: Tensor  # scalar: this micro-batch's part of the global denominator (tokens, labels or pairs)
    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # metric -> (sum, its count), detached scalars
    examples: dict[str, Tensor] = field(default_factory=dict)  # per example [E] or [E, A], detached
