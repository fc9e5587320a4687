"""How well a reward model predicts each attribute, over a whole held-out set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def regression_metrics(
    predictions: np.ndarray,
    labels: np.ndarray,
    attributes: Sequence[str],
    train_means: np.ndarray | None = None,
) -> dict[str, float]:
    """predictions, labels [N, A] (NaN label: missing), train_means [A]: mean label of each attribute in training.

    Per attribute, over its labels: mse/, mae/, pearson/, and mse_of_mean/, mae_of_mean/: the errors of always answering
    with the mean label (of the training data if given, else of this set, which flatters the baseline). Without a
    prefix: mean over the attributes. What is undefined (no label; a correlation with a constant) is left out.
    """
    metrics: dict[str, float] = {}
    for column, attribute in enumerate(attributes):
        valid = ~np.isnan(labels[:, column])
        if not valid.any():
            continue
        predicted = predictions[valid, column].astype(np.float64)
        actual = labels[valid, column].astype(np.float64)
        mean = float(actual.mean() if train_means is None else train_means[column])
        metrics[f"mse/{attribute}"] = float(np.mean((predicted - actual) ** 2))
        metrics[f"mae/{attribute}"] = float(np.mean(np.abs(predicted - actual)))
        metrics[f"mse_of_mean/{attribute}"] = float(np.mean((mean - actual) ** 2))
        metrics[f"mae_of_mean/{attribute}"] = float(np.mean(np.abs(mean - actual)))
        correlation = pearson(predicted, actual)
        if correlation is not None:
            metrics[f"pearson/{attribute}"] = correlation
    for name in ("mse", "mae", "mse_of_mean", "mae_of_mean", "pearson"):
        values = [value for key, value in metrics.items() if key.startswith(f"{name}/")]
        if values:
            metrics[name] = float(np.mean(values))
    return metrics


def pearson(first: np.ndarray, second: np.ndarray) -> float | None:
    """Correlation of two arrays [N]; None if one of them is constant."""
    first, second = first - first.mean(), second - second.mean()
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    if scale == 0:
        return None
    return float((first * second).sum() / scale)
