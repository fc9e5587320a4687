"""A forward-only pass whose values per example stay on disk: an interrupted one goes on where it stopped."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from nemo_align.data.source import Step
from nemo_align.data.tokenized_rows import TokenizedRows
from nemo_align.runtime.device import accelerator_name
from nemo_align.training.example_cache import ExampleCache
from nemo_align.training.forward import forward_mode, forward_steps
from nemo_align.training.forward_totals import ForwardTotals
from nemo_align.training.progress import Progress
from nemo_align.training.schedule_step import Objective
from nemo_align.training.session import Session

logger = logging.getLogger("nemo_align")

PROGRESS_LINES = 4  # of a pass, where there is no terminal


def open_cache(session: Session, root: Path, *, kind: str, names: tuple[str, ...]) -> ExampleCache:
    """The values of `kind` that the session's initial weights give, as far as they are known; the same on all ranks."""
    config = session.config
    identity = {
        "checkpoint": session.initial_identity,
        "dtype": config.precision.dtype,
        "fp8": config.precision.fp8,
        "kernels": accelerator_name(),
    }
    cache = ExampleCache(root, kind=kind, identity=identity, layout=session.topology.layout(), names=names)
    if known := cache.share(session.topology):
        logger.info("%s: %d examples cached", cache.kind, known)
    return cache


def compute_missing(
    session: Session,
    title: str,
    rows: TokenizedRows,
    steps: Iterable[Step],
    objective: Objective,
    cache: ExampleCache,
    totals: ForwardTotals,
) -> None:
    """Run those of `steps` that have an example that `cache` does not know, and add what `objective` gives per example.

    Raises `Stopped` on all ranks once one is asked to stop; what was computed is in the cache then.
    """
    topology = session.topology
    # Whole steps, as an undisturbed pass takes them: the values are the same to the last bit.
    missing = [step for step in steps if any(rows.example_fingerprint(index) not in cache for index in _indices(step))]
    num_missing = len(missing)
    outcomes = forward_steps(
        session.model_chunks,
        _drained(missing),
        objective,
        topology,
        session.stop,
        totals,
        collect_examples=True,
    )
    progress = Progress(title, num_missing, log_every=max(1, num_missing // PROGRESS_LINES), enabled=topology.is_main)
    try:
        with progress, forward_mode(session.model_chunks):
            for number, outcome in enumerate(outcomes, start=1):
                indices = outcome.examples["index"].astype(np.int64)
                fingerprints = [rows.example_fingerprint(index) for index in indices]
                cache.add(fingerprints, outcome.examples, write=topology.is_main)
                progress.update(number)
    finally:
        cache.flush()


def _drained(steps: list[Step]) -> Iterator[Step]:
    """Each step once, let go when the next is asked for: a step keeps its tensors."""
    steps.reverse()
    while steps:
        yield steps.pop()


def _indices(step: Step) -> list[int]:
    return [index for rank in step.plan.micro_batches for examples in rank for index in examples]
