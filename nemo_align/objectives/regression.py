"""Multi-attribute regression of the reward model (HelpSteer2, arXiv 2406.08673).

    L = sum_{e,a} M_ea (p_ea - y_ea)^2 / sum_{e,a} M_ea          M = 0 where the label is missing (NaN)

The denominator is the number of labels of the whole global batch: rows with many missing attributes do not weigh more
for having few companions in their micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_align.objectives.output import ObjectiveOutput


def metric_names(attributes: Sequence[str]) -> tuple[str, ...]:
    """Names of the sums that `regression` returns."""
    return tuple(f"{name}/{attribute}" for attribute in attributes for name in ("mse", "mae"))


def read_predictions(output: Tensor, read_positions: Tensor) -> Tensor:
    """[E, A]: the head's output [1, S, A] at the last token of each example."""
    assert output.shape[0] == 1, "rated responses are packed into one row"
    return output[0].index_select(0, read_positions)


def regression(predictions: Tensor, labels: Tensor, attributes: Sequence[str]) -> ObjectiveOutput:
    """Sum of squared errors over the labels that are there; the count is their number.

    predictions [E, A] fp32 (attached; E may be 0), labels [E, A] with NaN for a missing one, attributes: A names.
    Metrics per attribute and label: mse/<attribute>, mae/<attribute>. Per example: predictions.
    """
    valid = ~torch.isnan(labels)
    # The label is replaced before the subtraction: NaN times a zero gradient would still be NaN.
    error = torch.where(valid, predictions - torch.where(valid, labels, 0), 0)  # [E, A]
    squared = error.square()
    counts = valid.sum(dim=0)  # [A]
    squares, absolutes = squared.detach().sum(dim=0), error.detach().abs().sum(dim=0)
    sums = {}
    for column, attribute in enumerate(attributes):
        sums[f"mse/{attribute}"] = (squares[column], counts[column])
        sums[f"mae/{attribute}"] = (absolutes[column], counts[column])
    return ObjectiveOutput(
        loss=squared.sum(), count=valid.sum(), sums=sums, examples={"predictions": predictions.detach()}
    )
