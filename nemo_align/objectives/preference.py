"""Preference losses: DPO, IPO and reward-aware preference optimization, RPO (arXiv 2406.11704, section 3.3.2).

RPO here is Nemotron-4's Reward-aware Preference Optimization, which fits the size of the reward gap. It is not Meta's
Iterative RPO (DPO plus a likelihood term), which other tools call `rpo_alpha`.

    d = [log pi(c) - log ref(c)] - [log pi(l) - log ref(l)]       P pairs; sums over the response's tokens by default
    u = beta d, p = sigmoid(u)                                    implicit reward gap
    g = eta (R_c - R_l), q = sigmoid(g)                           target: the reward model's gap

    dpo          -log p
    rpo_bwd_kl   q log(q/p) + (1-q) log((1-q)/(1-p))              the report's
    rpo_fwd_kl   p log(p/q) + (1-p) log((1-p)/(1-q))
    rpo_sq       (u - g)^2
    ipo          (d - 1/(2 beta))^2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nemo_align.config.choices import NEEDS_REWARDS
from nemo_align.config.objectives import PreferenceConfig
from nemo_align.objectives.output import ObjectiveOutput

METRIC_NAMES = (
    "preference_loss",
    "sft_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "kl/ref",
)


def _dpo(u: Tensor, g: Tensor) -> Tensor:
    return -logsigmoid(u)


def _rpo_bwd_kl(u: Tensor, g: Tensor) -> Tensor:
    # Logarithms of probabilities throughout: log(1 - p) from p would be -inf beyond |u| = 17 in fp32.
    win = torch.sigmoid(g) * (logsigmoid(g) - logsigmoid(u))
    lose = torch.sigmoid(-g) * (logsigmoid(-g) - logsigmoid(-u))
    return win + lose


def _rpo_fwd_kl(u: Tensor, g: Tensor) -> Tensor:
    return _rpo_bwd_kl(g, u)


def _rpo_sq(u: Tensor, g: Tensor) -> Tensor:
    return (u - g).square()


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dpo": _dpo,
    "rpo_bwd_kl": _rpo_bwd_kl,
    "rpo_fwd_kl": _rpo_fwd_kl,
    "rpo_sq": _rpo_sq,
}
PREFERENCE_LOSSES = (*_LOSSES, "ipo")


def preference_loss(kind: str, d: Tensor, reward_gap: Tensor | None, *, beta: float, eta: float = 1.0) -> Tensor:
    """Loss of each pair [P] from d [P] and reward_gap = R_c - R_l [P] (None only for dpo and ipo), in d's dtype."""
    if kind not in PREFERENCE_LOSSES:
        raise ValueError(f"preference.preference_loss={kind!r}: choose one of {', '.join(PREFERENCE_LOSSES)}")
    if kind == "ipo":
        return (d - 1 / (2 * beta)).square()
    if kind in NEEDS_REWARDS:
        if reward_gap is None:
            raise ValueError(
                f"preference.preference_loss={kind!r} fits reward gaps, but the pairs have no rewards; give every row "
                "chosen_reward and rejected_reward (nemo-align score writes them)"
            )
        return _LOSSES[kind](beta * d, eta * reward_gap.to(d.dtype))
    return _LOSSES[kind](beta * d, torch.zeros_like(d))


@dataclass(frozen=True)
class ResponseLogProbs:
    """Summed log-probabilities and numbers of predicted tokens of the responses of P pairs, all float64 [P].

    Float64, because a sum over thousands of tokens in fp32 carries an error that DPO's first step would show."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


def response_log_probs(
    log_probs: Tensor, loss_mask: Tensor, segment_of_token: Tensor, num_pairs: int
) -> ResponseLogProbs:
    """Sum the log-probabilities of each response.

    log_probs, loss_mask [1, S]; segment_of_token [S]: 0 = first pair's chosen, 1 = its rejected, 2 = second pair's
    chosen ..., 2 x num_pairs = padding. The sums are attached to log_probs; with no pairs they are empty.
    """
    weighted = (log_probs * loss_mask).reshape(-1).double()
    sums = weighted.new_zeros(2 * num_pairs + 1).index_add(0, segment_of_token, weighted)
    mask = loss_mask.reshape(-1).double()
    counts = mask.new_zeros(2 * num_pairs + 1).index_add(0, segment_of_token, mask)
    responses, tokens = sums[: 2 * num_pairs].view(-1, 2), counts[: 2 * num_pairs].view(-1, 2)
    return ResponseLogProbs(responses[:, 0], responses[:, 1], tokens[:, 0], tokens[:, 1])


def reference_output(policy: ResponseLogProbs) -> ObjectiveOutput:
    """Objective of the reference pass: nothing to minimise, but of each pair what is to be kept: chosen_logps and
    rejected_logps (sums), chosen_tokens and rejected_tokens."""
    tokens = {"chosen_tokens": policy.chosen_tokens, "rejected_tokens": policy.rejected_tokens}
    return ObjectiveOutput(
        loss=-(policy.chosen.sum() + policy.rejected.sum()).float(),
        count=policy.chosen_tokens.sum() + policy.rejected_tokens.sum(),
        examples={**_examples(policy), **tokens},
    )


def preference(
    policy: ResponseLogProbs,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    reward_gap: Tensor | None,
    config: PreferenceConfig,
) -> ObjectiveOutput:
    """Sum over the pairs of preference_loss_weight * L + sft_loss_weight * (-log pi(c)); the count is P.

    reference_* [P]: summed log-probabilities under the reference, as `response_log_probs` gives them; reward_gap [P]:
    R_c - R_l, unscaled, or None. Metrics, means over pairs unless said otherwise: preference_loss, sft_loss,
    rewards/{chosen, rejected, margins} (beta times the log-ratio), rewards/accuracies (margin above 0; a tie is half),
    logps/{chosen, rejected} (as the loss uses them: sums, or token means if so configured),
    kl/ref (log-ratio per token of the chosen responses). Per example: chosen_logps, rejected_logps (sums) and margins.
    """
    average = config.preference_average_log_probs
    average_sft = average if config.sft_average_log_probs is None else config.sft_average_log_probs
    chosen_tokens, rejected_tokens = policy.chosen_tokens.clamp(min=1), policy.rejected_tokens.clamp(min=1)
    chosen_ratio = _log_ratio(policy.chosen, reference_chosen)
    rejected_ratio = _log_ratio(policy.rejected, reference_rejected)
    kl = (chosen_ratio.detach().sum(), policy.chosen_tokens.sum())
    chosen, rejected = policy.chosen, policy.rejected
    if average:
        chosen_ratio, rejected_ratio = chosen_ratio / chosen_tokens, rejected_ratio / rejected_tokens
        chosen, rejected = chosen / chosen_tokens, rejected / rejected_tokens

    beta = config.ref_policy_kl_penalty
    losses = preference_loss(
        config.preference_loss, chosen_ratio - rejected_ratio, reward_gap, beta=beta, eta=config.gt_reward_scale
    )
    sft_losses = -(policy.chosen / chosen_tokens if average_sft else policy.chosen)
    loss = config.preference_loss_weight * losses.sum() + config.sft_loss_weight * sft_losses.sum()

    rewards_chosen, rewards_rejected = beta * chosen_ratio.detach(), beta * rejected_ratio.detach()
    margins = rewards_chosen - rewards_rejected
    values = {
        "preference_loss": losses.detach(),
        "sft_loss": sft_losses.detach(),
        "rewards/chosen": rewards_chosen,
        "rewards/rejected": rewards_rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).double() + 0.5 * (margins == 0).double(),
        "logps/chosen": chosen.detach(),
        "logps/rejected": rejected.detach(),
    }
    count = losses.new_full((), losses.shape[0])  # made on the device: a copy from the host would wait for it
    sums = {name: (value.sum(), count) for name, value in values.items()}
    sums["kl/ref"] = kl
    return ObjectiveOutput(
        loss=loss.float(), count=count, sums=sums, examples={**_examples(policy), "margins": margins}
    )


def _log_ratio(policy: Tensor, reference: Tensor) -> Tensor:
    """log pi - log ref [P] in float64. The policy is rounded as the reference was when stored: equal weights then give
    exactly 0, and DPO's first loss is ln 2."""
    return policy.to(reference.dtype).double() - reference.double()


def _examples(policy: ResponseLogProbs) -> dict[str, Tensor]:
    return {"chosen_logps": policy.chosen.detach(), "rejected_logps": policy.rejected.detach()}
