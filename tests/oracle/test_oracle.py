"""The oracle itself, against published values and other implementations."""

from __future__ import annotations

import math

import pytest
import torch

from tests.oracle.checkpoints import write_hugging_face
from tests.oracle.model import Architecture, log_probabilities, random_weights
from tests.oracle.objectives import LOSSES
from tests.oracle.training import Optimizer, adam_step, learning_rate

# (u, g) -> dpo, rpo_bwd_kl, rpo_fwd_kl, rpo_sq, by hand from the formulas in docs/metrics.md.
TABLE = {
    (0.0, 1.0): (0.693147181, 0.110944072, 0.120114507, 1.0),
    (1.0, 0.0): (0.313261688, 0.120114507, 0.110944072, 1.0),
    (1.0, 2.0): (0.313261688, 0.067130754, 0.082607745, 1.0),
    (-1.0, 1.0): (1.313261688, 0.462117157, 0.462117157, 4.0),
    (3.0, 0.5): (0.048587352, 0.518362039, 0.306924950, 6.25),
}


@pytest.mark.parametrize("point", TABLE)
def test_preference_losses_have_the_tabulated_values(point):
    u, g = (torch.tensor([x], dtype=torch.float64) for x in point)
    beta = 0.25
    names = ("dpo", "rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")
    assert [float(LOSSES[name](u / beta, beta, g)) for name in names] == pytest.approx(TABLE[point], abs=1e-9)


@pytest.mark.parametrize("d, beta, loss", [(0, 0.1, 25), (1, 0.1, 16), (0, 0.5, 1), (2, 0.5, 1), (3, 0.2, 0.25)])
def test_ipo_has_the_tabulated_values(d, beta, loss):
    assert float(LOSSES["ipo"](torch.tensor([float(d)]), beta, torch.zeros(1))) == pytest.approx(loss)


@pytest.mark.parametrize("groups, head_dim", [(4, 12), (1, 12), (2, 20)])
def test_the_decoder_equals_the_one_of_transformers(groups, head_dim, tmp_path):
    from transformers import NemotronForCausalLM

    arch = Architecture(vocab_size=101, groups=groups, head_dim=head_dim)
    weights = random_weights(arch, seed=3)
    write_hugging_face(tmp_path / "model", weights, arch)
    model = NemotronForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64, attn_implementation="eager")
    tokens = torch.randint(0, 101, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(tokens).logits.log_softmax(dim=-1)
    torch.testing.assert_close(log_probabilities(weights, tokens, arch), expected, rtol=0, atol=1e-6)


def test_an_optimizer_step_equals_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(ours.clone())
    settings = Optimizer(lr=0.01, eps=1e-3)
    adam = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1)
    first, second = torch.zeros_like(ours), torch.zeros_like(ours)
    for step in range(1, 4):
        gradient = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        theirs.grad = gradient.clone()
        adam.step()
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.05)
        adam_step(ours, first, second, step, 0.01, settings)
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-15)


def test_schedules_reach_their_rates_where_they_should():
    def rates(**settings) -> list[float]:
        optimizer = Optimizer(lr=1.0, eps=1.0, min_lr=0.2, **settings)
        return [learning_rate(optimizer, [10] * 4, step) for step in range(4)]

    assert rates() == [1, 1, 1, 1]
    assert rates(schedule="linear", warmup_steps=2) == pytest.approx([0.5, 1, 0.6, 0.2])
    assert rates(schedule="cosine") == pytest.approx(
        [0.2 + 0.4 * (1 + math.cos(math.pi * n / 4)) for n in (1, 2, 3, 4)]
    )
    assert rates(schedule="wsd", decay_steps=2) == pytest.approx([1, 1, 0.6, 0.2])
