"""Core attention on SDPA against softmax written out, plain and packed, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nemo_align.runtime import device

device.install()

from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from nemo_align.model.attention import SdpaCoreAttention  # noqa: E402
from nemo_align.model.packed import packed_seq_params  # noqa: E402
from tests.unit.model.configs import transformer_config  # noqa: E402

HEADS, HEAD_SIZE = 8, 16


def _attention(**arguments) -> SdpaCoreAttention:
    return SdpaCoreAttention(
        transformer_config(),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type=None,
        pg_collection=None,
        **arguments,
    )


def _naive(query: Tensor, key: Tensor, value: Tensor, segment_of: Tensor, scale: float) -> Tensor:
    """[T, N, D], [T, G, D] -> [T, N * D], one head at a time in fp64, segments told apart by a mask."""
    tokens = torch.arange(len(query))
    visible = (tokens[:, None] >= tokens[None, :]) & (segment_of[:, None] == segment_of[None, :])
    heads_per_group = query.size(1) // key.size(1)
    heads = []
    for head in range(query.size(1)):
        scores = query[:, head].double() @ key[:, head // heads_per_group].double().T * scale
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        heads.append(weights @ value[:, head // heads_per_group].double())
    return torch.cat(heads, dim=-1)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def _assert_same(result: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    upstream = _random(*result.shape, seed=9).detach()
    gradients = torch.autograd.grad((result * upstream).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), inputs)
    torch.testing.assert_close(result.double(), expected, atol=2e-6, rtol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 8], ids=["mqa", "gqa", "mha"])
def test_plain_equals_naive_softmax(groups: int) -> None:
    sequence, batch = 13, 3
    query = _random(sequence, batch, HEADS, HEAD_SIZE, seed=1)
    key, value = (_random(sequence, batch, groups, HEAD_SIZE, seed=seed) for seed in (2, 3))
    result = _attention()(query, key, value, None, attn_mask_type=AttnMaskType.causal)
    one_segment = torch.zeros(sequence)
    expected = torch.stack(
        [_naive(query[:, row], key[:, row], value[:, row], one_segment, HEAD_SIZE**-0.5) for row in range(batch)], dim=1
    )
    assert result.shape == (sequence, batch, HEADS * HEAD_SIZE)
    _assert_same(result, expected, [query, key, value])


@pytest.mark.parametrize(
    "lengths",
    [[5, 9, 1, 3], [4, 4, 4, 4], [4, 7, 4, 1, 7], [18], [0, 6, 0, 5]],
    ids=["different", "equal", "some_equal", "one", "empty_segments"],
)
@pytest.mark.parametrize("groups", [2, 8])
def test_packed_equals_masked_softmax(lengths: list[int], groups: int) -> None:
    tokens = sum(lengths)
    query = _random(tokens, HEADS, HEAD_SIZE, seed=1)
    key, value = (_random(tokens, groups, HEAD_SIZE, seed=seed) for seed in (2, 3))
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    result = _attention()(query, key, value, None, packed_seq_params=packed_seq_params(boundaries, max(lengths)))
    segment_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    assert result.shape == (tokens, HEADS * HEAD_SIZE)
    _assert_same(result, _naive(query, key, value, segment_of, HEAD_SIZE**-0.5), [query, key, value])


def test_given_scale_is_used() -> None:
    query, key, value = (_random(6, 1, HEADS, HEAD_SIZE, seed=seed) for seed in (1, 2, 3))
    result = _attention(softmax_scale=0.7)(query, key, value, None)
    expected = _naive(query[:, 0], key[:, 0], value[:, 0], torch.zeros(6), 0.7)
    torch.testing.assert_close(result[:, 0].double(), expected, atol=2e-6, rtol=1e-5)


def test_bf16_keeps_its_format_and_stays_near() -> None:
    query, key, value = (_random(32, 1, HEADS, HEAD_SIZE, seed=seed).detach().bfloat16() for seed in (1, 2, 3))
    result = _attention()(query, key, value, None)
    expected = _naive(query[:, 0], key[:, 0], value[:, 0], torch.zeros(32), HEAD_SIZE**-0.5)
    assert result.dtype == torch.bfloat16
    # Rounding of weights and result: two units of 2^-8 of values of order one.
    torch.testing.assert_close(result[:, 0].double(), expected, atol=0.02, rtol=0.02)


def test_boundaries_are_checked() -> None:
    with pytest.raises(AssertionError, match="8 tokens is above max_seqlen=5"):
        packed_seq_params(torch.tensor([0, 8, 10], dtype=torch.int32), 5)
    with pytest.raises(AssertionError, match="rise from 0"):
        packed_seq_params(torch.tensor([0, 8, 3], dtype=torch.int32), 8)
