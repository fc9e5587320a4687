"""The reference pass: log-probabilities of both responses of every pair under the initial weights, once per stage."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nemo_align.data.batch import Batch
from nemo_align.data.tokenized_rows import TokenizedRows
from nemo_align.objectives.output import ObjectiveOutput
from nemo_align.objectives.preference import reference_output, response_log_probs
from nemo_align.runtime.exit_codes import STOPPED_AFTER_SAVING
from nemo_align.runtime.topology import Topology
from nemo_align.stages.rows import cache_directory, row_source
from nemo_align.stages.token_log_probs import token_log_probs
from nemo_align.training.cached_pass import compute_missing, open_cache
from nemo_align.training.forward_totals import ForwardTotals, Stopped
from nemo_align.training.session import Session

logger = logging.getLogger("nemo_align")

# What `reference_output` gives for each pair -> the name under which the objective of training finds it.
TARGETS = {"chosen_logps": "reference_chosen_logps", "rejected_logps": "reference_rejected_logps"}
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
    cache = open_cache(session, cache_directory(session), kind="reference_log_probs", names=(*TARGETS, *TOKENS))
    totals = ForwardTotals()
    objective = ResponseLogProbs(config.model.vocab_size, topology)
    try:
        for name, rows in sets.items():
            source = row_source(session, rows, kind="pairs")
            steps = source.evaluation(config.train.global_batch_size)
            compute_missing(session, f"reference {name}", rows, steps, objective, cache, totals)
    except Stopped:
        logger.info("stopped by a signal during the reference pass: what was computed is cached")
        raise SystemExit(STOPPED_AFTER_SAVING) from None
    values = {}
    for name, rows in sets.items():
        columns = cache.columns(rows.example_fingerprint(index) for index in range(len(rows)))
        values[name] = {target: columns[key] for key, target in TARGETS.items()}
    return ReferenceLogProbs(values=values, totals=totals)
