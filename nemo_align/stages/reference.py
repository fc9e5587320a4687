"""The reference pass: log-probabilities of both responses of every pair under the initial weights, once per stage."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nemo_align.data.batch import Batch
from nemo_align.data.source import Step
from nemo_align.data.tokenized_rows import TokenizedRows
from nemo_align.objectives.output import ObjectiveOutput
from nemo_align.objectives.preference import reference_output, response_log_probs
from nemo_align.runtime.device import accelerator_name
from nemo_align.runtime.exit_codes import STOPPED_AFTER_SAVING
from nemo_align.runtime.topology import Topology
from nemo_align.stages.rows import cache_directory, row_source
from nemo_align.stages.token_log_probs import token_log_probs
from nemo_align.training.forward import forward_mode, forward_steps
from nemo_align.training.forward_totals import ForwardTotals, Stopped
from nemo_align.training.progress import Progress
from nemo_align.training.reference_cache import ReferenceCache
from nemo_align.training.session import Session

logger = logging.getLogger("nemo_align")

# What `reference_output` gives for each pair -> the name under which the objective of training finds it.
TARGETS = {"chosen_logps": "reference_chosen_logps", "rejected_logps": "reference_rejected_logps"}
PROGRESS_LINES = 4  # of a pass, where there is no terminal
TOKENS = ("chosen_tokens", "rejected_tokens")


@dataclass
class ReferenceLogProbs:
    """`values[set][name]`: float32 [pairs]. `totals`: what this run computed, nothing if all was cached."""

    values: dict[str, dict[str, np.ndarray]]
    totals: ForwardTotals


class ResponseLogProbs:
    """Forward-only objective: summed log-probability and token count of each response. It has no loss."""

    metric_names = ()

    def __init__(self, vocab_size: int, topology: Topology) -> None:
        self.vocab_size = vocab_size
        self.topology = topology

    def __call__(self, output: Tensor, batch: Batch) -> ObjectiveOutput:
        log_probs, _ = token_log_probs(output, batch, self.topology, self.vocab_size)
        return reference_output(
            response_log_probs(log_probs, batch.loss_mask, batch.segment_of_token, batch.num_examples)
        )


def reference_log_probs(session: Session, sets: dict[str, TokenizedRows]) -> ReferenceLogProbs:
    """Log-probabilities of every pair of every set under the session's initial weights.

    Computed batch by batch in the order of the rows and published every few seconds, so that an interrupted pass goes
    on where it stopped. Exits the process when a stop is asked for.
    """
    config, topology = session.config, session.topology
    cache = ReferenceCache(
        cache_directory(session),
        identity={
            "checkpoint": session.initial_identity,
            "dtype": config.precision.dtype,
            "fp8": config.precision.fp8,
            "kernels": accelerator_name(),
        },
        layout=topology.layout(),
        names=(*TARGETS, *TOKENS),
    )
    known = cache.share(topology)
    totals = ForwardTotals()
    if known:
        logger.info("reference log-probabilities: %d pairs cached", known)
    try:
        for name, rows in sets.items():
            _compute_missing(session, name, rows, cache, totals)
    except Stopped:
        logger.info("stopped by a signal during the reference pass: what was computed is cached")
        raise SystemExit(STOPPED_AFTER_SAVING) from None
    values = {}
    for name, rows in sets.items():
        columns = cache.columns(rows.example_fingerprint(index) for index in range(len(rows)))
        values[name] = {target: columns[key] for key, target in TARGETS.items()}
    return ReferenceLogProbs(values=values, totals=totals)


def _compute_missing(
    session: Session, name: str, rows: TokenizedRows, cache: ReferenceCache, totals: ForwardTotals
) -> None:
    config, topology = session.config, session.topology
    source = row_source(session, rows, kind="pairs", sequences_per_example=2)
    missing = [
        step
        for step in source.evaluation(config.train.global_batch_size)
        if any(rows.example_fingerprint(index) not in cache for index in _indices(step))
    ]
    num_missing = len(missing)
    outcomes = forward_steps(
        session.model_chunks,
        _drained(missing),
        ResponseLogProbs(config.model.vocab_size, topology),
        topology,
        session.stop,
        totals,
        collect_examples=True,
    )
    log_every = max(1, num_missing // PROGRESS_LINES)
    progress = Progress(f"reference {name}", num_missing, log_every=log_every, enabled=topology.is_main)
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
