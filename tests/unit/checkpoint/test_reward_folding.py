"""The reward head's bias inside the final norm's."""

from __future__ import annotations

import pytest
import torch

from nemo_align.checkpoint.huggingface.reward_head import fold_bias


def test_scores_stay_and_the_shift_is_the_shortest() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 64, generator=generator), torch.randn(5, generator=generator)
    norm_bias, hidden = torch.randn(64, generator=generator), torch.randn(9, 64, generator=generator).double()
    folded = fold_bias(weight, bias, norm_bias)
    assert folded.dtype == torch.float32
    shift = folded.double() - norm_bias.double()
    found = (hidden + shift) @ weight.double().T
    # One rounding of each entry to fp32 (6e-8), seen through weights of size one.
    torch.testing.assert_close(found, hidden @ weight.double().T + bias.double(), rtol=0, atol=1e-5)
    shortest = torch.linalg.pinv(weight.double()) @ bias.double()
    torch.testing.assert_close(shift, shortest, rtol=0, atol=1e-6)


def test_no_bias_changes_nothing_even_where_weights_repeat() -> None:
    norm_bias = torch.randn(8).bfloat16()
    assert torch.equal(fold_bias(torch.ones(3, 8), torch.zeros(3), norm_bias), norm_bias.float())


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(2, 8),  # the same attribute twice
        torch.eye(2, 8) + torch.tensor([[0.0] * 8, [1e5] + [0.0] * 7]),  # almost
        torch.randn(9, 8),  # more attributes than hidden channels
        torch.zeros(2, 8),
    ],
)
def test_dependent_weights_are_refused(weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"condition number .* at most 1000 allowed.*reward\.head_bias=false"):
        fold_bias(weight, torch.arange(1.0, weight.shape[0] + 1), torch.zeros(8))
