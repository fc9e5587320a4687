"""The objective of pretrain and sft: the next token."""

from __future__ import annotations

from torch import Tensor

from nemo_align.data.batch import Batch
from nemo_align.objectives.language_model import METRIC_NAMES, language_model
from nemo_align.objectives.log_probs import log_probs_and_hits
from nemo_align.objectives.output import ObjectiveOutput
from nemo_align.runtime.topology import Topology


class LanguageModelObjective:
    """Negative log-likelihood of the labelled tokens, divided by their global number."""

    metric_names = METRIC_NAMES

    def __init__(self, vocab_size: int, topology: Topology) -> None:
        self.vocab_size = vocab_size
        self.topology = topology

    def __call__(self, output: Tensor, batch: Batch) -> ObjectiveOutput:
        log_probs, hits = log_probs_and_hits(
            output,
            batch.labels,
            group=self.topology.tensor_group,
            vocab_size=self.vocab_size,
            mask=batch.loss_mask,
            num_masked_in=batch.loss_tokens,
        )
        return language_model(log_probs, batch.loss_mask, hits)
