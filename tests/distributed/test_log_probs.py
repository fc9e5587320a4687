"""Log-probabilities over a split vocabulary equal those over the whole one, values and gradients."""

from __future__ import annotations

import pytest
import torch

from nemo_align.objectives.log_probs import log_probs_and_hits

VOCAB, ROWS, LENGTH = 21, 2, 9


def _whole(dtype: torch.dtype, padded: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(ROWS, LENGTH, padded, generator=generator, dtype=torch.float64) * 4
    labels = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator)
    labels[0, :2] = torch.tensor([0, VOCAB - 1])  # both ends of the vocabulary
    mask = (torch.rand(ROWS, LENGTH, generator=generator) < 0.7).float()
    return logits.to(dtype), labels, mask


def _on_rank(dtype: torch.dtype, padded: int, masked: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's log-probabilities, hits and gradient of its columns under sum(weight * log p)."""
    group = torch.distributed.group.WORLD
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    logits, labels, mask = _whole(dtype, padded)
    shard = logits.chunk(world, dim=-1)[rank].clone().requires_grad_()
    log_probs, hits = log_probs_and_hits(
        shard, labels, group=group, vocab_size=VOCAB, mask=mask if masked else None, chunk_tokens=4
    )
    weight = torch.arange(1.0, 1.0 + labels.numel(), dtype=log_probs.dtype).view_as(log_probs)
    (log_probs * weight).sum().backward()
    return log_probs.detach(), hits, shard.grad


# 24 columns: the last rank holds padding too. 48: at TP 2 the second rank has padding only, and no real column.
@pytest.mark.parametrize(("dtype", "padded"), [(torch.float64, 24), (torch.float64, 48), (torch.bfloat16, 24)])
@pytest.mark.parametrize("masked", [False, True])
def test_two_ranks_equal_one(pool2, dtype: torch.dtype, padded: int, masked: bool) -> None:
    logits, labels, mask = _whole(dtype, padded)
    logits = logits.double().requires_grad_()
    expected = logits[..., :VOCAB].log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    if masked:
        expected = expected * mask
    weight = torch.arange(1.0, 1.0 + labels.numel(), dtype=torch.float64).view_as(expected)
    (expected * weight).sum().backward()
    best = logits[..., :VOCAB].argmax(-1)

    results = pool2.run(_on_rank, dtype, padded, masked)
    # bf16 logits are reduced in fp32 (1e-6); their gradient is rounded to bf16 (2^-9 relative).
    tight, loose = (1e-12, 1e-12) if dtype == torch.float64 else (1e-5, 4e-3)
    for log_probs, hits, _ in results:
        torch.testing.assert_close(log_probs.double(), expected, rtol=tight, atol=tight)
        if dtype == torch.float64:  # bf16 logits may tie
            assert torch.equal(hits, (best == labels) & ((mask == 1) | (not masked)))
    grad = torch.cat([result[2] for result in results], dim=-1)
    assert grad.dtype == dtype and (grad[..., VOCAB:] == 0).all()
    torch.testing.assert_close(grad.double(), logits.grad, rtol=loose, atol=loose)
