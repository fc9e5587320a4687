"""Steps of a dataset: a stage trains on `step(consumed, ...)` and is validated on `evaluation(...)`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nemo_align.data.batch import Batch
from nemo_align.data.collate import collate_packed
from nemo_align.data.sampler import EpochSampler
from nemo_align.data.step_plan import StepLayout, StepPlan, plan_step

if TYPE_CHECKING:
    from nemo_align.data.tokenized_rows import TokenizedRows


@dataclass
class Step:
    """A planned step with the micro-batches of one data-parallel rank."""

    plan: StepPlan
    data_rank: int
    build: Callable[[tuple[int, ...]], Batch]  # dataset indices of a micro-batch -> its tensors, on the CPU
    _built: dict[int, Batch] = field(default_factory=dict, repr=False)

    def micro_batches(self) -> Iterator[Batch]:
        """A new iterator on each call: each model chunk of an interleaved schedule draws from its own.

        The tensors are built once, when first asked for, and shared by the iterators."""
        for k, examples in enumerate(self.plan.micro_batches[self.data_rank]):
            if k not in self._built:
                self._built[k] = self.build(examples)
            yield self._built[k]


class StepSource(Protocol):
    """What the training loop and the forward-only runner read."""

    num_examples: int  # of one epoch
    kind: str  # what the examples are, for the log
    fingerprint: str  # of everything that decides content and order; a resume compares it

    def step(self, consumed: int, batch_size: int) -> Step:
        """The batch after `consumed` examples. Stateless: the integer alone resumes."""
        ...

    def evaluation(self, batch_size: int) -> Iterator[Step]:
        """Every example exactly once, in order; the last batch may be short."""
        ...


class RowSource:
    """Steps over tokenized rows (dialogues, rated responses or pairs), packed."""

    def __init__(
        self,
        rows: TokenizedRows,
        *,
        layout: StepLayout,
        data_rank: int,
        seed: int,
        kind: str = "rows",
        extra_targets: dict[str, np.ndarray] | None = None,
    ) -> None:
        """extra_targets: name -> [N] or [N, A], added to the rows' own targets (cached reference log-probabilities).

        Raises ValueError at once if any row is longer than a micro-batch, not in the step that first meets it."""
        self.rows = rows
        self.layout = layout
        self.data_rank = data_rank
        self.kind = kind
        self.num_examples = len(rows)
        self.fingerprint = f"{rows.fingerprint}-seed{seed}"
        self.targets = dict(rows.targets)
        for name, values in (extra_targets or {}).items():
            assert name not in self.targets, f"target {name} is in the rows already"
            assert len(values) == len(rows), f"target {name}: {len(values)} values for {len(rows)} rows"
            self.targets[name] = values
        self._sampler = EpochSampler(len(rows), seed)
        longest = int(np.argmax(rows.lengths.sum(axis=1)))
        self._step([longest])

    def step(self, consumed: int, batch_size: int) -> Step:
        return self._step(self._sampler.batch(consumed, batch_size))

    def evaluation(self, batch_size: int) -> Iterator[Step]:
        for start in range(0, self.num_examples, batch_size):
            yield self._step(range(start, min(start + batch_size, self.num_examples)))

    def _step(self, indices: Sequence[int] | np.ndarray) -> Step:
        plan = plan_step(indices, self.rows.lengths, self.rows.loss_tokens, **asdict(self.layout))

        def build(examples: tuple[int, ...]) -> Batch:
            return collate_packed(self.rows, examples, plan.length, self.targets)

        return Step(plan, self.data_rank, build)
