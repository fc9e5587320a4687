"""The objective of pretrain and sft: the next token."""

from __future__ import annotations

from torch import Tensor

from nemo_align.data.batch import Batch
from nemo_align.objectives.language_model import METRIC_NAMES, language_model
from nemo_align.objectives.output import ObjectiveOutput
from nemo_align.runtime.topology import Topology
from nemo_align.stages.token_log_probs import token_log_probs


class LanguageModelObjective:
    """Negative log-likelihood of the labelled tokens, divided by their global number."""

    metric_names = METRIC_NAMES

    def __init__(self, vocab_size: int, topology: Topology) -> None:
        self.vocab_size = vocab_size
        self.topology = topology

    def __call__(self, output: Tensor, batch: Batch) -> ObjectiveOutput:
        log_probs, hits = token_log_probs(output, batch, self.topology, self.vocab_size)
        return language_model(log_probs, batch.loss_mask, hits)
