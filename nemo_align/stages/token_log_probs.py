"""What the objectives on tokens have in common: log-probabilities of the labels."""

from __future__ import annotations

from torch import Tensor

from nemo_align.data.batch import Batch
from nemo_align.objectives.log_probs import log_probs_and_hits
from nemo_align.runtime.topology import Topology


def token_log_probs(logits: Tensor, batch: Batch, topology: Topology, vocab_size: int) -> tuple[Tensor, Tensor]:
    """log p of each labelled token, fp32 [B, S], and whether it was the most likely one, bool [B, S].

    logits [B, S, V / tensor]: nothing else reads them, so their buffer takes their gradient.
    """
    return log_probs_and_hits(
        logits,
        batch.labels,
        group=topology.tensor_group,
        vocab_size=vocab_size,
        mask=batch.loss_mask,
        num_masked_in=batch.loss_tokens,
        overwrite_logits=True,
    )
