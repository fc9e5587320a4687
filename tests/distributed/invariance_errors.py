"""How far a run of the package is from the oracle's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.distributed import invariance_report
from tests.distributed.invariance_design import ALL_ARCHITECTURES
from tests.distributed.invariance_runs import LR, STEPS
from tests.distributed.stage_runs import numbers
from tests.oracle.checkpoints import read_megatron
from tests.oracle.model import Architecture
from tests.oracle.pairwise import Case
from tests.oracle.training import Outcome

EXACT = ("step", "num_tokens")
# Part of the whole gradient's largest element below which the elements of a tensor are not looked at more closely.
FLOOR = 1e-3


@dataclass(frozen=True)
class Bounds:
    """What fp32 may differ from fp64, a few times the largest error of the design.

    metrics: fp32 keeps 24 bits (6e-8), and a value has gone through sums of some hundred terms.
    gradient: sums over all tokens that nearly cancel keep the rounding of their terms.
    weights: Adam's update changes by lr / eps x the gradient's error (eps is 1e-3 here), and a weight of 0.5 has a
    spacing of 6e-8, which is 6e-5 of this learning rate.
    """

    metrics: float = 5e-6
    gradient: float = 1e-5
    weights: float = 1.5e-3


def fp32_bounds(case: Case) -> Bounds:
    """IPO's are wider: a response's summed log-probability of 150 has a spacing of 1.5e-5 in fp32, and IPO squares the
    distance of such sums, which also gives it the largest gradients."""
    return Bounds(metrics=5e-5, weights=1e-2) if case["objective"] == "ipo" else Bounds()


@dataclass
class Errors:
    """The largest distances between a run and the oracle."""

    metrics: dict[str, float] = field(default_factory=dict)  # |difference| / max(1, |expected|); of lr / |expected|
    gradient: float = 0.0  # |difference| of an element / largest element of its tensor
    direction: float = 0.0  # L2 norm of the gradients' difference / L2 norm of the gradient
    weights: float = 0.0  # |difference| of an element / peak learning rate
    update: float = 0.0  # L2 norm of the difference / L2 norm of what training changed, over all weights

    @property
    def metric(self) -> tuple[float, str]:
        """The largest error of a metric, and its name."""
        return max((error, name) for name, error in self.metrics.items())


def compare(case: Case, run_dir: Path, records: list[dict], expected: Outcome, *, bf16: bool = False) -> Errors:
    """Distances of the run in `run_dir`. Asserts what must be equal: names of metrics and tensors, counts, zeros."""
    arch = ALL_ARCHITECTURES[case["architecture"]]
    checkpoints = run_dir / "checkpoints"
    errors = Errors()
    _compare_records("text" if case["objective"] == "pretrain" else "rows", records, expected, errors)
    _compare_gradients(checkpoints / "step_0000001", arch, expected, errors)
    _compare_weights(checkpoints / f"step_{STEPS:07d}", arch, expected, errors, bf16=bf16)
    return errors


def _compare_records(held_out_set: str, records: list[dict], expected: Outcome, errors: Errors) -> None:
    prefix = f"validation/{held_out_set}/"
    actual = [*numbers(records, "train"), *numbers(records, "validation")]
    held_out = [
        {"step": step, **{prefix + name: value for name, value in values.items()}}
        for step, values in zip((0, STEPS), expected.validation, strict=True)
    ]
    for found, wanted in zip(actual, [*expected.train, *held_out], strict=True):
        undecided = {name.replace("slack ", ""): value for name, value in wanted.items() if "slack " in name}
        wanted = {name: value for name, value in wanted.items() if "slack " not in name}
        assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
        for name, value in wanted.items():
            if name in EXACT:
                assert found[name] == value, name
                continue
            scale = abs(value) if name == "lr" else max(1.0, abs(value))
            error = max(0.0, abs(found[name] - value) - undecided.get(name, 0.0)) / scale
            short = name.removeprefix(prefix)
            errors.metrics[short] = max(errors.metrics.get(short, 0.0), error)


def _compare_gradients(checkpoint: Path, arch: Architecture, expected: Outcome, errors: Errors) -> None:
    moments, padding = read_megatron(checkpoint, arch, "optimizer.state.exp_avg.")
    assert moments.keys() == expected.first_gradient.keys(), moments.keys() ^ expected.first_gradient.keys()
    largest = max(float(value.abs().max()) for value in expected.first_gradient.values())
    difference_squared = squared = 0.0
    for name, moment in moments.items():
        wanted = expected.first_gradient[name]
        # After one step Adam's first moment is (1 - beta1) x the gradient that it was given.
        gradient = moment.double() / ((1 - 0.9) * expected.first_clipping)
        assert gradient.shape == wanted.shape, name
        difference = gradient - wanted
        scale = max(float(wanted.abs().max()), FLOOR * largest)
        errors.gradient = max(errors.gradient, float(difference.abs().max()) / scale)
        difference_squared += float(difference.square().sum())
        squared += float(wanted.square().sum())
    errors.direction = math.sqrt(difference_squared / squared)
    assert not any(rows.any() for rows in padding.values()), "padding rows of the vocabulary have a gradient"


def _compare_weights(checkpoint: Path, arch: Architecture, expected: Outcome, errors: Errors, *, bf16: bool) -> None:
    weights, _ = read_megatron(checkpoint, arch)
    if bf16:
        # The fp32 weights that the optimizer keeps (sharded under one name, replicated under another).
        for prefix in ("optimizer.state.param.", "optimizer.state.fp32_param."):
            weights |= read_megatron(checkpoint, arch, prefix)[0]
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert weights.keys() == expected.weights.keys()
    difference_squared = squared = 0.0
    for name, value in weights.items():
        difference = value.double() - expected.weights[name]
        errors.weights = max(errors.weights, float(difference.abs().max()) / LR)
        difference_squared += float(difference.square().sum())
        squared += float((expected.weights[name] - expected.initial[name]).square().sum())
    errors.update = math.sqrt(difference_squared / squared)


def check_fp32(case: Case, errors: Errors, *, how: str, name: str) -> None:
    """Hold a run to the bounds of fp32, and record its errors under `how` (the report's heading) and `name`."""
    metric, which = errors.metric
    found = {"metric": metric, "gradient": errors.gradient, "weight / lr": errors.weights}
    invariance_report.record(how, name, found)
    bounds = fp32_bounds(case)
    assert metric <= bounds.metrics, (which, errors.metrics)
    assert errors.gradient <= bounds.gradient
    assert errors.weights <= bounds.weights
