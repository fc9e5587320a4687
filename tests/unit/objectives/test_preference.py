"""Every preference loss against the closed forms of the report and NeMo-Aligner's definitions."""

from __future__ import annotations

import math

import pytest
import torch

from nemo_align.config.objectives import PreferenceConfig
from nemo_align.objectives.preference import (
    METRIC_NAMES,
    NEEDS_REWARDS,
    PREFERENCE_LOSSES,
    preference,
    preference_loss,
    reference_output,
    response_log_probs,
)

# u, g, then loss and dloss/du of dpo, rpo_bwd_kl, rpo_fwd_kl, rpo_sq; derived in double precision
TABLE = [
    (0, 0, 0.693147181, -0.5, 0, 0, 0, 0, 0, 0),
    (0, 1, 0.693147181, -0.5, 0.110944072, -0.231058579, 0.120114507, -0.25, 1, -2),
    (0, 2, 0.693147181, -0.5, 0.327813325, -0.380797078, 0.433780830, -0.5, 4, -4),
    (1, 0, 0.313261688, -0.268941421, 0.120114507, 0.231058579, 0.110944072, 0.196611933, 1, 2),
    (1, 1, 0.313261688, -0.268941421, 0, 0, 0, 0, 0, 0),
    (1, 2, 0.313261688, -0.268941421, 0.067130754, -0.149738499, 0.082607745, -0.196611933, 1, -2),
    (2, 1, 0.126928011, -0.119202922, 0.082607745, 0.149738499, 0.067130754, 0.104993585, 1, 2),
    (-1, 1, 1.313261688, -0.731058579, 0.462117157, -0.462117157, 0.462117157, -0.393223866, 4, -4),
    (1, -1, 0.313261688, -0.268941421, 0.462117157, 0.462117157, 0.462117157, 0.393223866, 4, 4),
    (0.5, 1.5, 0.474076984, -0.377540669, 0.090238182, -0.195115145, 0.104876963, -0.235003712, 1, -2),
    (3, 0.5, 0.048587352, -0.047425873, 0.518362039, 0.330114796, 0.306924950, 0.112941649, 6.25, 5),
]


def _loss(kind: str, u: float, g: float, beta: float = 1.0, eta: float = 1.0) -> tuple[float, float]:
    """(loss, dloss/du) at implicit gap u and target gap g, reached through d = u / beta and the reward gap g / eta."""
    d = torch.tensor([u / beta], dtype=torch.float64, requires_grad=True)
    gap = torch.tensor([g / eta], dtype=torch.float64)
    value = preference_loss(kind, d, gap, beta=beta, eta=eta)
    (grad,) = torch.autograd.grad(value.sum(), d)
    return value.item(), grad.item() / beta


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"u{row[0]}_g{row[1]}")
@pytest.mark.parametrize(("beta", "eta"), [(1.0, 1.0), (0.1, 2.0)])
def test_table_of_values_and_gradients(row: tuple, beta: float, eta: float) -> None:
    u, g, *expected = row
    for number, kind in enumerate(("dpo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")):
        loss, slope = _loss(kind, u, g, beta, eta)
        assert loss == pytest.approx(expected[2 * number], abs=1e-9), kind
        assert slope == pytest.approx(expected[2 * number + 1], abs=1e-9), kind


@pytest.mark.parametrize(("d", "beta", "value"), [(0, 0.1, 25), (1, 0.1, 16), (0, 0.5, 1), (2, 0.5, 1), (3, 0.2, 0.25)])
def test_ipo(d: float, beta: float, value: float) -> None:
    tensor = torch.tensor([float(d)], dtype=torch.float64, requires_grad=True)
    loss = preference_loss("ipo", tensor, None, beta=beta)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    loss.sum().backward()
    assert tensor.grad.item() == pytest.approx(2 * (d - 1 / (2 * beta)), rel=1e-12)


@pytest.mark.parametrize("kind", NEEDS_REWARDS)
@pytest.mark.parametrize("gap", [-20.0, -1.5, 0.0, 0.3, 8.0, 40.0])
def test_rpo_is_zero_with_zero_gradient_at_its_target(kind: str, gap: float) -> None:
    assert _loss(kind, gap, gap) == (0.0, pytest.approx(0.0, abs=1e-15))


@pytest.mark.parametrize("u", [-3.0, 0.0, 2.0])
def test_rpo_tends_to_dpo_for_a_large_gap(u: float) -> None:
    loss, slope = _loss("rpo_bwd_kl", u, 40.0)
    assert loss == pytest.approx(_loss("dpo", u, 0.0)[0], abs=1e-14)
    assert slope == pytest.approx(_loss("dpo", u, 0.0)[1], abs=1e-14)


def test_the_two_kl_are_each_other_with_swapped_arguments() -> None:
    assert _loss("rpo_bwd_kl", 0.7, -1.2)[0] == pytest.approx(_loss("rpo_fwd_kl", -1.2, 0.7)[0], rel=1e-14)


def test_rpo_is_label_smoothed_dpo_minus_the_target_entropy() -> None:
    u, epsilon = 0.8, 0.1
    g = math.log((1 - epsilon) / epsilon)
    smoothed = -(1 - epsilon) * math.log(1 / (1 + math.exp(-u))) - epsilon * math.log(1 / (1 + math.exp(u)))
    entropy = -epsilon * math.log(epsilon) - (1 - epsilon) * math.log(1 - epsilon)
    assert _loss("rpo_bwd_kl", u, g)[0] == pytest.approx(smoothed - entropy, rel=1e-12)


@pytest.mark.parametrize("g", [0.0, 1.0, 4.0])
def test_first_step_closed_forms(g: float) -> None:
    """Policy = reference, u = 0."""
    q = 1 / (1 + math.exp(-g))
    entropy = -q * math.log(q) - (1 - q) * math.log(1 - q)
    assert _loss("dpo", 0, g)[0] == pytest.approx(math.log(2), rel=1e-15)
    assert _loss("rpo_sq", 0, g)[0] == pytest.approx(g**2)
    assert _loss("rpo_bwd_kl", 0, g)[0] == pytest.approx(math.log(2) - entropy, rel=1e-12, abs=1e-15)
    fwd = -math.log(2) - (math.log(q) + math.log(1 - q)) / 2
    assert _loss("rpo_fwd_kl", 0, g)[0] == pytest.approx(fwd, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("kind", ["rpo_bwd_kl", "rpo_fwd_kl"])
def test_stable_far_from_the_target(kind: str) -> None:
    for dtype in (torch.float32, torch.float64):
        d = torch.tensor([50.0], dtype=dtype, requires_grad=True)
        loss = preference_loss(kind, d, torch.tensor([-50.0]), beta=1.0)
        assert loss.item() == pytest.approx(50.0, rel=1e-6)
        loss.sum().backward()
        assert torch.isfinite(d.grad).all()


def test_unknown_loss_and_missing_rewards_are_refused() -> None:
    d = torch.zeros(1)
    with pytest.raises(ValueError, match="rpo_bwd_kl"):
        preference_loss("rpo", d, None, beta=0.1)
    with pytest.raises(ValueError, match="chosen_reward"):
        preference_loss("rpo_sq", d, None, beta=0.1)


# Two pairs: chosen0 (3 tokens, 2 predicted), rejected0 (2, 1), chosen1 (2, 2), rejected1 (2, 2); 3 tokens of padding.
SEGMENTS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4])
MASK = torch.tensor([[1.0, 1, 0, 1, 0, 1, 1, 1, 1, 0, 0, 0]])
LOG_PROBS = -torch.arange(1.0, 13.0)[None]


def _policy(log_probs: torch.Tensor):
    return response_log_probs(log_probs, MASK, SEGMENTS, 2)


def test_responses_are_summed_by_segment() -> None:
    policy = _policy(LOG_PROBS)
    assert policy.chosen.tolist() == [-3.0, -13.0] and policy.rejected.tolist() == [-4.0, -17.0]
    assert policy.chosen_tokens.tolist() == [2, 2] and policy.rejected_tokens.tolist() == [1, 2]
    assert policy.chosen.dtype == torch.float64
    stored = reference_output(policy)
    assert stored.count == 7 and stored.examples["rejected_logps"].tolist() == [-4.0, -17.0]
    assert stored.examples["chosen_tokens"].tolist() == [2, 2]


@pytest.mark.parametrize("kind", PREFERENCE_LOSSES)
@pytest.mark.parametrize("average", [False, True])
def test_total_loss_and_its_gradient(kind: str, average: bool) -> None:
    """dL/dlog pi(c_t) = mask (beta dL/du - sft) and the opposite sign without sft for rejected; by finite formulas."""
    log_probs = LOG_PROBS.clone().requires_grad_()
    config = PreferenceConfig(
        preference_loss=kind,
        ref_policy_kl_penalty=0.2,
        gt_reward_scale=1.5,
        preference_loss_weight=2.0,
        sft_loss_weight=0.25,
        preference_average_log_probs=average,
        sft_average_log_probs=False,
    )
    reference_chosen, reference_rejected = torch.tensor([-2.0, -15.0]), torch.tensor([-6.0, -15.0])
    gap = torch.tensor([1.0, -0.5])
    output = preference(_policy(log_probs), reference_chosen, reference_rejected, gap, config)
    output.loss.backward()

    tokens_c, tokens_l = (torch.tensor([2.0, 2.0]), torch.tensor([1.0, 2.0])) if average else (1, 1)
    ratio_c = (torch.tensor([-3.0, -13.0]) - reference_chosen) / tokens_c
    ratio_l = (torch.tensor([-4.0, -17.0]) - reference_rejected) / tokens_l
    d = (ratio_c - ratio_l).double().requires_grad_()
    pairs = preference_loss(kind, d, gap, beta=0.2, eta=1.5)
    pairs.sum().backward()
    assert output.loss.item() == pytest.approx(2.0 * pairs.sum().item() + 0.25 * (3.0 + 13.0), rel=1e-6)
    slope_c, slope_l = 2.0 * d.grad / tokens_c - 0.25, -2.0 * d.grad / tokens_l
    expected = torch.zeros(12, dtype=torch.float64)
    expected[[0, 1]], expected[3] = slope_c[0], slope_l[0]
    expected[[5, 6]], expected[[7, 8]] = slope_c[1], slope_l[1]
    torch.testing.assert_close(log_probs.grad[0].double(), expected, rtol=1e-6, atol=1e-7)
    assert output.count == 2


def test_metrics() -> None:
    config = PreferenceConfig(ref_policy_kl_penalty=0.5)
    reference_chosen, reference_rejected = torch.tensor([-4.0, -13.0]), torch.tensor([-4.0, -17.0])
    output = preference(_policy(LOG_PROBS), reference_chosen, reference_rejected, None, config)
    assert set(output.sums) == set(METRIC_NAMES)
    mean = {name: float(total) / float(count) for name, (total, count) in output.sums.items()}
    assert mean["rewards/chosen"] == pytest.approx(0.5 * 1.0 / 2)  # beta times log-ratios 1 and 0
    assert mean["rewards/margins"] == pytest.approx(0.25)
    assert mean["rewards/accuracies"] == pytest.approx(0.75)  # one won, one tie
    assert mean["logps/chosen"] == pytest.approx(-8.0)
    assert mean["kl/ref"] == pytest.approx(1.0 / 4)  # per token of the chosen responses
    assert mean["sft_loss"] == pytest.approx(8.0)


def test_first_loss_is_ln_2_when_the_reference_was_stored_in_fp32() -> None:
    """Sums of thousands of tokens lose bits when stored; the policy's are rounded alike, so the ratio is exactly 0."""
    generator = torch.Generator().manual_seed(0)
    log_probs = -3 * torch.rand(1, 8192, generator=generator)
    segments = torch.arange(8192) // 4096
    policy = response_log_probs(log_probs, torch.ones(1, 8192), segments, 1)
    config = PreferenceConfig(ref_policy_kl_penalty=1.0)
    output = preference(policy, policy.chosen.float(), policy.rejected.float(), None, config)
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-7)


def test_an_empty_micro_batch_adds_nothing() -> None:
    log_probs = torch.zeros(1, 4, requires_grad=True)
    policy = response_log_probs(log_probs, torch.zeros(1, 4), torch.zeros(4, dtype=torch.int64), 0)
    output = preference(
        policy, torch.zeros(0), torch.zeros(0), torch.zeros(0), PreferenceConfig(preference_loss="rpo_sq")
    )
    output.loss.backward()
    assert output.loss == 0 and output.count == 0 and (log_probs.grad == 0).all()
