"""Masked regression and its metrics, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_align.objectives.language_model import language_model
from nemo_align.objectives.regression import metric_names, read_predictions, regression
from nemo_align.objectives.regression_metrics import regression_metrics

NAN = float("nan")


def test_sum_count_and_gradient_with_missing_labels() -> None:
    predictions = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    labels = torch.tensor([[3.0, NAN], [3.0, 1.0]])
    output = regression(predictions, labels, ["helpfulness", "verbosity"])
    assert output.loss.item() == 4 + 0 + 9 and output.count == 3
    output.loss.backward()
    assert predictions.grad.tolist() == [[-4.0, 0.0], [0.0, 6.0]]  # 2 M (p - y), finite where the label is missing
    assert set(output.sums) == set(metric_names(["helpfulness", "verbosity"]))
    assert [float(value) for value in output.sums["mse/helpfulness"]] == [4.0, 2.0]
    assert [float(value) for value in output.sums["mae/verbosity"]] == [3.0, 1.0]


def test_split_into_micro_batches_does_not_show() -> None:
    """Sums over any split, divided once, are the same: the micro-batch mean would give (4 + 4.5) / 2 here."""
    predictions, labels = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[3.0, NAN], [3.0, 1.0]])
    parts = [regression(predictions[i : i + 1], labels[i : i + 1], ["a", "b"]) for i in range(2)]
    assert sum(p.loss for p in parts) / sum(p.count for p in parts) == pytest.approx(13 / 3)


def test_predictions_are_read_at_the_given_tokens_and_an_empty_micro_batch_has_a_gradient() -> None:
    output = torch.arange(12.0).view(1, 6, 2).requires_grad_()
    assert read_predictions(output, torch.tensor([1, 5])).tolist() == [[2, 3], [10, 11]]
    empty = regression(read_predictions(output, torch.empty(0, dtype=torch.int64)), torch.empty(0, 2), ["a", "b"])
    empty.loss.backward()
    assert empty.count == 0 and (output.grad == 0).all()


def test_metrics_of_a_whole_set() -> None:
    labels = np.array([[0.0, 2.0], [2.0, 2.0], [4.0, NAN]])
    predictions = np.array([[1.0, 1.0], [2.0, 3.0], [3.0, 9.0]])
    metrics = regression_metrics(predictions, labels, ["a", "b"], train_means=np.array([1.0, 2.0]))
    assert metrics["mse/a"] == pytest.approx(2 / 3) and metrics["mae/a"] == pytest.approx(2 / 3)
    assert metrics["mae_of_mean/a"] == pytest.approx((1 + 1 + 3) / 3)
    assert metrics["mse_of_mean/a"] == pytest.approx((1 + 1 + 9) / 3)
    assert metrics["pearson/a"] == pytest.approx(1.0)
    assert metrics["mae/b"] == pytest.approx(1.0)
    assert "pearson/b" not in metrics  # constant labels: undefined, not 0 and not NaN
    assert metrics["mae"] == pytest.approx((2 / 3 + 1.0) / 2) and metrics["pearson"] == pytest.approx(1.0)


def test_pearson_equals_numpy() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 50, 1))
    metrics = regression_metrics(first, second, ["a"])
    assert metrics["pearson/a"] == pytest.approx(np.corrcoef(first[:, 0], second[:, 0])[0, 1], rel=1e-12)
    assert metrics["mae_of_mean/a"] == pytest.approx(np.abs(second - second.mean()).mean())


def test_language_model_sums_over_predicted_tokens() -> None:
    log_probs = torch.tensor([[-1.0, -2.0, -4.0]], requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0]])
    output = language_model(log_probs, mask, torch.tensor([[True, True, False]]))
    output.loss.backward()
    assert output.loss.item() == 5.0 and output.count == 2
    assert log_probs.grad.tolist() == [[-1.0, -0.0, -1.0]]
    assert [float(value) for value in output.sums["accuracy"]] == [1.0, 2.0]
