"""The chunked log-probabilities against torch.log_softmax, values and gradients, on one process."""

from __future__ import annotations

import pytest
import torch

from nemo_align.objectives.log_probs import log_probs_and_hits

VOCAB, PADDED = 23, 32


def vocab_parallel_log_probs(*arguments, **keywords):
    """The log-probabilities alone."""
    return log_probs_and_hits(*arguments, **keywords)[0]


def _inputs(dtype: torch.dtype, rows: int = 2, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, length, PADDED, generator=generator, dtype=torch.float64) * 3).to(dtype)
    return logits.requires_grad_(), torch.randint(0, VOCAB, (rows, length), generator=generator)


def _oracle(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.double()[..., :VOCAB].log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
@pytest.mark.parametrize("overwrite", [False, True])
def test_equals_log_softmax_in_double_precision(chunk_tokens: int, overwrite: bool) -> None:
    logits, labels = _inputs(torch.float64)
    weight = torch.randn(labels.shape, dtype=torch.float64)
    expected = _oracle(logits, labels)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), logits)

    actual = vocab_parallel_log_probs(
        logits, labels, group=None, vocab_size=VOCAB, chunk_tokens=chunk_tokens, overwrite_logits=overwrite
    )
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    (grad,) = torch.autograd.grad((actual * weight).sum(), logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-13)
    assert (grad[..., VOCAB:] == 0).all()
    assert (grad.data_ptr() == logits.data_ptr()) == overwrite


def test_gradcheck() -> None:
    logits, labels = _inputs(torch.float64, rows=1, length=4)
    mask = torch.tensor([[1, 0, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda z: vocab_parallel_log_probs(z, labels, group=None, vocab_size=VOCAB, mask=mask, chunk_tokens=2), logits
    )


@pytest.mark.parametrize("known_on_host", [False, True])
def test_masked_tokens_cost_nothing_and_move_nothing(known_on_host: bool) -> None:
    logits, labels = _inputs(torch.float64)
    mask = (torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    expected = _oracle(logits, labels) * mask
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits)
    actual, hits = log_probs_and_hits(
        logits,
        labels,
        group=None,
        vocab_size=VOCAB,
        mask=mask,
        num_masked_in=int(mask.sum()) if known_on_host else None,
        chunk_tokens=3,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    assert (actual[mask == 0] == 0).all() and not hits[mask == 0].any()
    (grad,) = torch.autograd.grad(actual.sum(), logits)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-13)


def test_nothing_to_predict_still_has_a_gradient_of_zero() -> None:
    """An empty micro-batch goes through backward like any other, or the schedule would stop."""
    logits, labels = _inputs(torch.float32)
    actual = vocab_parallel_log_probs(
        logits, labels, group=None, vocab_size=VOCAB, mask=torch.zeros(labels.shape), num_masked_in=0
    )
    actual.sum().backward()
    assert (actual == 0).all() and (logits.grad == 0).all()


def test_hits_are_argmax() -> None:
    logits, labels = _inputs(torch.float32)
    with torch.no_grad():
        logits[0, :4].scatter_(1, labels[0, :4, None], 50.0)
        logits[..., VOCAB:] = 99.0  # padding never wins
    _, hits = log_probs_and_hits(logits, labels, group=None, vocab_size=VOCAB)
    assert torch.equal(hits, logits[..., :VOCAB].argmax(-1) == labels)
    assert hits[0, :4].all()


def test_bf16_logits_are_reduced_in_fp32() -> None:
    """The result is that of the rounded logits, not a bf16 sum; the gradient has the logits' format."""
    logits, labels = _inputs(torch.bfloat16)
    actual = vocab_parallel_log_probs(logits, labels, group=None, vocab_size=VOCAB)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), _oracle(logits, labels), rtol=1e-6, atol=1e-6)
    actual.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0], [-3e4, -3e4, -3e4]]], requires_grad=True)
    labels = torch.tensor([[1, 2]])
    actual = vocab_parallel_log_probs(logits, labels, group=None, vocab_size=3)
    torch.testing.assert_close(actual, torch.tensor([[-2e4, -float(torch.log(torch.tensor(3.0)))]]))
    actual.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_keeps_no_fp32_copy_of_the_logits() -> None:
    """What lives between forward and backward: the bf16 logits themselves and a few values per token."""
    logits, labels = _inputs(torch.bfloat16, rows=1, length=64)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        vocab_parallel_log_probs(logits, labels, group=None, vocab_size=VOCAB)
    assert [t.data_ptr() for t in saved if t.numel() > 2 * labels.numel()] == [logits.data_ptr()]
