"""A training run on one set of weights: global batches, global-norm clipping, AdamW, learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle.data import Example
from tests.oracle.model import Weights


@dataclass(frozen=True)
class Optimizer:
    """Keys of the `optimizer` group; the defaults are the package's."""

    lr: float
    eps: float
    min_lr: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    decay_steps: int | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_grad: float = 1.0


@dataclass(frozen=True)
class Outcome:
    """What a run shows of itself."""

    train: list[dict[str, float]]  # one record per step
    validation: list[dict[str, float]]  # before the first and after the last step
    first_gradient: Weights  # of the loss of step 1, before clipping
    first_clipping: float  # what step 1 multiplied it with
    initial: Weights  # before the first step
    weights: Weights  # after the last step


def learning_rate(optimizer: Optimizer, sizes: list[int], step: int) -> float:
    """Of the update of `step` (from 0). The schedule is a function of the examples consumed with that step."""
    consumed = sum(sizes[: step + 1])
    warmup = sum(sizes[: optimizer.warmup_steps])
    total = sum(sizes)
    if optimizer.schedule == "wsd":
        end, begin = total, sum(sizes[: len(sizes) - optimizer.decay_steps])
    else:
        begin, end = warmup, total if optimizer.decay_steps is None else sum(sizes[: optimizer.decay_steps])
    if consumed <= warmup:
        return optimizer.lr * consumed / warmup
    if optimizer.schedule == "constant" or consumed <= begin:
        return optimizer.lr
    done = min(1.0, (consumed - begin) / (end - begin))
    left = 0.5 * (1 + math.cos(math.pi * done)) if optimizer.schedule == "cosine" else 1 - done
    return optimizer.min_lr + left * (optimizer.lr - optimizer.min_lr)


def train(objective, weights: Weights, batches: list[list[Example]], optimizer: Optimizer, held_out) -> Outcome:
    """`held_out(weights)`: metrics of the held-out sets by name, without their prefix."""
    initial = weights
    weights = {name: value.clone().requires_grad_() for name, value in weights.items()}
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    records, validation = [], [held_out(weights)]
    sizes = [len(batch) for batch in batches]
    tokens = 0
    for step, batch in enumerate(batches):
        loss, metrics = objective(weights, batch)
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        # Megatron-core's clipping: the norm is taken a millionth larger.
        clipping = min(1.0, optimizer.clip_grad / (norm + 1e-6)) if optimizer.clip_grad > 0 else 1.0
        if step == 0:
            first_gradient, first_clipping = gradients, clipping
        rate = learning_rate(optimizer, sizes, step)
        for name, weight in weights.items():
            gradient = clipping * gradients[name]
            first[name].lerp_(gradient, 1 - optimizer.beta1)
            second[name].lerp_(gradient.square(), 1 - optimizer.beta2)
            adam_step(weight.data, first[name], second[name], step + 1, rate, optimizer)
        tokens += sum(example.num_tokens for example in batch)
        records.append(
            {"step": step + 1, "loss": float(loss.detach()), **metrics}
            | {"grad_norm": norm, "lr": rate, "num_tokens": tokens}
        )
    validation.append(held_out(weights))
    final = {name: weight.detach() for name, weight in weights.items()}
    return Outcome(records, validation, first_gradient, first_clipping, initial, final)


def adam_step(weight: Tensor, first: Tensor, second: Tensor, step: int, rate: float, optimizer: Optimizer) -> None:
    """AdamW in place: decoupled weight decay on matrices only, bias-corrected moments, eps outside of the root."""
    if weight.dim() > 1:
        weight.mul_(1 - rate * optimizer.weight_decay)
    mean = first / (1 - optimizer.beta1**step)
    deviation = (second / (1 - optimizer.beta2**step)).sqrt()
    weight.sub_(rate * mean / (deviation + optimizer.eps))
