"""The forward-only runner: validation, the reference pass and scoring."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import get_model_config

from nemo_align.data.source import Step, StepSource
from nemo_align.runtime import watchdog
from nemo_align.runtime.topology import Topology
from nemo_align.training.forward_totals import ForwardTotals, Stopped
from nemo_align.training.schedule_step import Objective, StepOutcome, run_step
from nemo_align.training.task import SetMetrics


class Stops(Protocol):
    """Who knows whether the run was asked to stop: a StopRequest, or the training loop's `Saving`."""

    def agreed(self, topology: Topology) -> bool: ...


@contextmanager
def forward_mode(model_chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Evaluation mode without gradients, which leaves no trace in training.

    Parameters gathered lazily by the optimizer are gathered first; FP8's delayed recipe rests.
    """
    overlapped = [
        chunk
        for chunk in model_chunks
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather
    ]
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)
    modes = [chunk.training for chunk in model_chunks]
    for chunk in model_chunks:
        chunk.eval()
    try:
        with torch.no_grad(), _without_delayed_fp8(model_chunks):
            yield
    finally:
        for chunk, mode in zip(model_chunks, modes, strict=True):
            chunk.train(mode)
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()


@contextmanager
def _without_delayed_fp8(model_chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Compute in bf16 what FP8's delayed recipe would scale.

    Its scales move in passes with gradients alone. A reference pass before training would be scaled by 1, and the
    largest values of any pass without gradients would go into the scales of the training step after it.
    """
    configs = [get_model_config(chunk) for chunk in model_chunks]
    formats = [config.fp8 for config in configs]
    for config in configs:
        if config.fp8 and config.fp8_recipe == "delayed":
            config.fp8 = None
    try:
        yield
    finally:
        for config, number_format in zip(configs, formats, strict=True):
            config.fp8 = number_format


def forward_steps(
    model_chunks: list[torch.nn.Module],
    steps: Iterator[Step],
    objective: Objective,
    topology: Topology,
    stop: Stops,
    totals: ForwardTotals,
    *,
    collect_examples: bool,
) -> Iterator[StepOutcome]:
    """Outcome of each step in turn, inside `forward_mode`. All ranks raise `Stopped` once one is asked to stop."""
    for number, step in enumerate(steps, start=1):
        watchdog.beat(f"forward-only batch {number}")
        if stop.agreed(topology):
            raise Stopped
        begin = time.perf_counter()
        outcome = run_step(
            model_chunks, step, objective, topology, forward_only=True, collect_examples=collect_examples
        )
        totals.add(step.plan, time.perf_counter() - begin)
        yield outcome


def validate(
    model_chunks: list[torch.nn.Module],
    validation: dict[str, StepSource],
    objective: Objective,
    topology: Topology,
    stop: Stops,
    totals: ForwardTotals,
    *,
    batch_size: int,
    set_metrics: SetMetrics | None,
) -> dict[str, float]:
    """Metrics `validation/<set>/<name>` over every example of every held-out set, each counted once.

    Means are formed from sums over the whole set, so they do not depend on `batch_size`.
    """
    metrics: dict[str, float] = {}
    for name, source in validation.items():
        sums = _SetSums()
        outcomes = forward_steps(
            model_chunks,
            source.evaluation(batch_size),
            objective,
            topology,
            stop,
            totals,
            collect_examples=set_metrics is not None,
        )
        with forward_mode(model_chunks):
            for outcome in outcomes:
                sums.add(outcome)
        values = sums.means()
        if set_metrics is not None:
            values |= set_metrics(sums.examples(), source)
        metrics |= {f"validation/{name}/{key}": value for key, value in values.items()}
    return metrics


class _SetSums:
    """Adds up the outcomes of the steps of one held-out set."""

    def __init__(self) -> None:
        self._totals: dict[str, list[float]] = {}
        self._parts: list[dict[str, np.ndarray]] = []

    def add(self, outcome: StepOutcome) -> None:
        for name, (total, count) in outcome.sums.items():
            entry = self._totals.setdefault(name, [0.0, 0.0])
            entry[0] += total
            entry[1] += count
        if outcome.examples:
            self._parts.append(outcome.examples)

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self._totals.items() if count > 0}

    def examples(self) -> dict[str, np.ndarray]:
        if not self._parts:
            return {}
        return {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
