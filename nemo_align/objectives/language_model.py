"""Next-token loss: pretraining and supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from nemo_align.objectives.output import ObjectiveOutput

METRIC_NAMES = ("accuracy",)


def language_model(log_probs: Tensor, loss_mask: Tensor, hits: Tensor | None = None) -> ObjectiveOutput:
    """Sum of -log p over the predicted tokens; the count is their number.

    log_probs [B, S] (attached), loss_mask [B, S] 0 or 1, hits [B, S] bool: the label is the most likely token.
    Metrics: accuracy (if `hits` is given), per predicted token.
    """
    loss = -(log_probs * loss_mask).sum()
    count = loss_mask.sum()
    sums = {}
    if hits is not None:
        sums["accuracy"] = ((hits * loss_mask).sum(), count)
    return ObjectiveOutput(loss=loss, count=count, sums=sums)
