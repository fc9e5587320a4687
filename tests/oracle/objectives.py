"""Loss and metrics of a set of examples at once, from the formulas of the report and docs/metrics.md.

Every mean is taken over the whole set: there are no micro-batches here.

A metric that counts comes with `slack <metric>`: the part of it that rounding may decide, because two numbers that are
compared lie within `resolution` of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracle.data import Example
from tests.oracle.model import Architecture, Weights, log_probabilities, scores

Metrics = dict[str, float]


def padded(sequences: Sequence[list]) -> Tensor:
    """[B, S]; zeros behind shorter sequences."""
    width = max(map(len, sequences))
    return torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in sequences])


def predicted_log_probs(weights: Weights, examples: list[Example], arch: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """(log p of each token after the first, whether it is predicted, its lead over all others in log p), [B, S - 1]."""
    sequences = [sequence for example in examples for sequence in example.sequences]
    tokens = padded([sequence.tokens for sequence in sequences])
    predicted = padded([sequence.predicted for sequence in sequences])[:, 1:].bool()
    log_probs = log_probabilities(weights, tokens, arch)[:, :-1]
    labels = tokens[:, 1:, None]
    of_token = log_probs.gather(-1, labels)[..., 0]
    best_other = log_probs.detach().scatter(-1, labels, -torch.inf).max(dim=-1).values
    return of_token, predicted, of_token.detach() - best_other


def share(chosen: Tensor) -> float:
    return float(chosen.double().mean())


class LanguageModel:
    """Mean negative log-likelihood of the predicted tokens."""

    def __init__(self, arch: Architecture, resolution: float) -> None:
        self.arch = arch
        self.resolution = resolution

    def __call__(self, weights: Weights, examples: list[Example]) -> tuple[Tensor, Metrics]:
        log_probs, predicted, lead = predicted_log_probs(weights, examples, self.arch)
        lead = lead[predicted]
        accuracy = {"accuracy": share(lead >= 0), "slack accuracy": share(lead.abs() < self.resolution)}
        return -log_probs[predicted].mean(), accuracy


class Regression:
    """Mean squared error over the labels that are there."""

    def __init__(self, arch: Architecture, attributes: list[str]) -> None:
        self.arch = arch
        self.attributes = attributes

    def __call__(self, weights: Weights, examples: list[Example]) -> tuple[Tensor, Metrics]:
        predictions = self.predictions(weights, examples)
        errors: dict[str, Tensor] = {}
        for column, name in enumerate(self.attributes):
            labelled = [row for row, example in enumerate(examples) if name in example.targets]
            labels = torch.tensor([examples[row].targets[name] for row in labelled], dtype=torch.float64)
            errors[name] = predictions[labelled, column] - labels
        metrics = {}
        for name, error in errors.items():
            if len(error):
                metrics[f"mse/{name}"] = float(error.detach().square().mean())
                metrics[f"mae/{name}"] = float(error.detach().abs().mean())
        return torch.cat(list(errors.values())).square().mean(), metrics

    def predictions(self, weights: Weights, examples: list[Example]) -> Tensor:
        """[E, A], read at the last token."""
        sequences = [example.sequences[0].tokens for example in examples]
        positions = torch.tensor([len(sequence) - 1 for sequence in sequences])
        return scores(weights, padded(sequences), positions, self.arch)

    def held_out_metrics(self, weights: Weights, examples: list[Example], training: list[Example]) -> Metrics:
        """What docs/metrics.md adds for held-out sets."""
        predictions = self.predictions(weights, examples).detach()
        metrics: Metrics = {}
        for column, name in enumerate(self.attributes):
            labelled = [row for row, example in enumerate(examples) if name in example.targets]
            labels = torch.tensor([examples[row].targets[name] for row in labelled], dtype=torch.float64)
            known = [example.targets[name] for example in training if name in example.targets]
            off = sum(known) / len(known) - labels
            metrics[f"pearson/{name}"] = float(
                torch.corrcoef(torch.stack([predictions[labelled, column], labels]))[0, 1]
            )
            metrics[f"mse_of_mean/{name}"] = float(off.square().mean())
            metrics[f"mae_of_mean/{name}"] = float(off.abs().mean())
            error = predictions[labelled, column] - labels
            metrics[f"mse/{name}"], metrics[f"mae/{name}"] = float(error.square().mean()), float(error.abs().mean())
        for kind in ("mse", "mae", "pearson", "mse_of_mean", "mae_of_mean"):
            metrics[kind] = sum(metrics[f"{kind}/{name}"] for name in self.attributes) / len(self.attributes)
        return metrics


def _kl(log_first: tuple[Tensor, Tensor], log_second: tuple[Tensor, Tensor]) -> Tensor:
    """KL of two Bernoulli variables given as (log p, log(1 - p))."""
    return sum(first.exp() * (first - second) for first, second in zip(log_first, log_second, strict=True))


def _both(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(-x)


# (d, beta, g) -> loss of each pair; u = beta d.
LOSSES: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {
    "dpo": lambda d, beta, g: -_both(beta * d)[0],
    "ipo": lambda d, beta, g: (d - 1 / (2 * beta)) ** 2,
    "rpo_bwd_kl": lambda d, beta, g: _kl(_both(g), _both(beta * d)),
    "rpo_fwd_kl": lambda d, beta, g: _kl(_both(beta * d), _both(g)),
    "rpo_sq": lambda d, beta, g: (beta * d - g) ** 2,
}


@dataclass(frozen=True)
class PreferenceSettings:
    """Keys of the `preference` group."""

    loss: str
    beta: float = 0.1
    eta: float = 1.0
    weight: float = 1.0
    sft_weight: float = 0.0
    average: bool = False


class Preference:
    """The preference losses against the weights that training starts from."""

    def __init__(self, arch: Architecture, settings: PreferenceSettings, reference: Weights, resolution: float) -> None:
        self.arch = arch
        self.resolution = resolution
        self.settings = settings
        self.reference = reference

    def __call__(self, weights: Weights, examples: list[Example]) -> tuple[Tensor, Metrics]:
        settings = self.settings
        policy, tokens = self._responses(weights, examples)
        with torch.no_grad():
            reference, _ = self._responses(self.reference, examples)
        ratio = policy - reference
        kl = float(ratio[:, 0].detach().sum() / tokens[:, 0].sum())
        if settings.average:
            policy, ratio = policy / tokens, ratio / tokens
        gap = settings.eta * torch.tensor([example.targets["gap"] for example in examples], dtype=torch.float64)
        losses = LOSSES[settings.loss](ratio[:, 0] - ratio[:, 1], settings.beta, gap)
        sft = -policy[:, 0].mean()
        loss = settings.weight * losses.mean() + settings.sft_weight * sft
        rewards = settings.beta * ratio.detach()
        margins = rewards[:, 0] - rewards[:, 1]
        wins = (margins > 0).double() + 0.5 * (margins == 0).double()
        values = {
            "preference_loss": losses,
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": margins,
            "rewards/accuracies": wins,
            "logps/chosen": policy[:, 0],
            "logps/rejected": policy[:, 1],
        }
        metrics = {name: float(value.detach().mean()) for name, value in values.items()}
        # While policy and reference are equal every margin is rounding.
        slack = {"slack rewards/accuracies": share(margins.abs() < self.resolution)}
        return loss, metrics | slack | {"sft_loss": float(sft.detach()), "kl/ref": kl}

    def _responses(self, weights: Weights, examples: list[Example]) -> tuple[Tensor, Tensor]:
        """(summed log p, number of predicted tokens) of each response, [P, 2]."""
        log_probs, predicted, _ = predicted_log_probs(weights, examples, self.arch)
        sums = torch.where(predicted, log_probs, 0).sum(dim=1).view(-1, 2)
        return sums, predicted.sum(dim=1).view(-1, 2)
