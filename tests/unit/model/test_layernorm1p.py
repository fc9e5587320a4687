"""LayerNorm1P against Hugging Face's, and the reasons for a module of our own."""

from __future__ import annotations

import pytest
import torch

from nemo_align.runtime import device

device.install()

from nemo_align.model.layernorm1p import LayerNorm1P  # noqa: E402
from tests.unit.model.configs import transformer_config  # noqa: E402

HIDDEN = 96


def _pair(dtype: torch.dtype, eps: float = 1e-5):
    from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P

    generator = torch.Generator().manual_seed(0)
    ours = LayerNorm1P(transformer_config(params_dtype=dtype), HIDDEN, eps)
    theirs = NemotronLayerNorm1P(HIDDEN, eps=eps)
    with torch.no_grad():
        for mine, other in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
            other.normal_(0, 0.3, generator=generator)
            mine.copy_(other)
            other.copy_(mine.float())  # the same bf16 values
    hidden = torch.randn(7, 3, HIDDEN, generator=generator, dtype=torch.float32) * 3 + 1
    return ours, theirs, hidden.to(dtype)


def test_values_and_gradients_equal_hugging_face_in_fp32() -> None:
    ours, theirs, hidden = _pair(torch.float32)
    mine, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    upstream = torch.randn_like(hidden)
    (ours(mine) * upstream).sum().backward()
    (theirs(other) * upstream).sum().backward()
    torch.testing.assert_close(ours(mine), theirs(other))
    torch.testing.assert_close(mine.grad, other.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_bf16_is_fp32_arithmetic_rounded_once() -> None:
    ours, theirs, hidden = _pair(torch.bfloat16)
    assert ours.weight.dtype == torch.bfloat16
    exact = theirs(hidden.float())
    result = ours(hidden)
    assert result.dtype == torch.bfloat16
    # Half a unit in the last place of bf16 (8 bits of mantissa) and nothing more.
    assert ((result.float() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_small_weights_survive_bf16() -> None:
    """1 + 2^-10 is 1 in bf16: the sum must not be formed there."""
    ours, _, hidden = _pair(torch.bfloat16)
    with torch.no_grad():
        ours.bias.zero_()
        ours.weight.fill_(2**-10)
        shifted = ours(hidden).float().abs().sum()
        ours.weight.zero_()
        plain = ours(hidden).float().abs().sum()
    assert shifted / plain == pytest.approx(1 + 2**-10, abs=3e-4)


def test_epsilon_is_used() -> None:
    ours, theirs, hidden = _pair(torch.float32, eps=0.5)
    torch.testing.assert_close(ours(hidden * 0.1), theirs(hidden * 0.1))


@pytest.mark.parametrize("sequence", [False, True])
def test_parameters_carry_the_sequence_parallel_mark(sequence: bool) -> None:
    config = transformer_config(tensor_model_parallel_size=2, sequence_parallel=sequence)
    norm = LayerNorm1P(config, HIDDEN)
    assert norm.weight.sequence_parallel is sequence and norm.bias.sequence_parallel is sequence
