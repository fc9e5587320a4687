"""Log-probability of each label under logits whose vocabulary is split over the tensor-parallel group.

Shapes: B rows, S tokens, V/TP columns of this rank (padding columns of the vocabulary included), M tokens computed.

    log p(label) = z_label - m - log sum_v exp(z_v - m)          m = max_v z_v, over all ranks
    d log p / d z_v = [v = label] - exp(z_v - m) / sum           on each rank for its own columns

The forward pass keeps the logits it was given, in the model's number format, and two fp32 values per token. The softmax
is formed again in the backward pass, a chunk of tokens at a time, so no fp32 copy of the logits ever exists and no
one-hot matrix either (at V = 256,000 that alone would be gigabytes).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

# Tokens of a chunk. A GPU wants few kernels (at V/TP = 32,000: 64 MiB per fp32 buffer); a CPU wants the chunk in its
# cache (measured there at V = 32,000, bf16: 32 tokens 161 ms, 512 tokens 267 ms for the same work).
_CHUNK_TOKENS = {"cuda": 512, "cpu": 32}


def log_probs_and_hits(
    logits: Tensor,
    labels: Tensor,
    *,
    group: ProcessGroup | None,
    vocab_size: int,
    mask: Tensor | None = None,
    num_masked_in: int | None = None,
    chunk_tokens: int | None = None,
    overwrite_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """(log p(labels) fp32 [B, S], hits bool [B, S]: no token is more likely than the label).

    logits [B, S, V/TP]: this rank's columns, rank r of `group` holds columns r*V/TP onwards (group None: all of them).
    labels [B, S] int64: below vocab_size. vocab_size: real tokens; columns from there on are padding, stand outside
    of the softmax and get zero gradient, so results do not move with the padding that a layout needs.
    mask [B, S]: only tokens where it is not 0 are computed (prompts cost nothing); the others return 0, not hit, and
    get zero gradient. num_masked_in: how many those are, if the host knows: without it a GPU has to be waited for.
    overwrite_logits: the backward pass writes the gradient into the memory of the logits. Saves the largest buffer of
    the step; allowed when nothing else reads the logits and backward runs once.
    fp64 logits give fp64 results (for tests of the mathematics).
    """
    config = _Config(group, vocab_size, chunk_tokens or _CHUNK_TOKENS[logits.device.type], overwrite_logits)
    rows = _chosen_rows(mask, num_masked_in)
    return _VocabParallelLogProbs.apply(logits, labels, rows, config)


@dataclass(frozen=True)
class _Config:
    group: ProcessGroup | None
    vocab_size: int
    chunk_tokens: int
    overwrite_logits: bool

    def columns(self, width: int) -> tuple[int, int]:
        """(global number of this rank's first column, how many of its columns are real tokens)."""
        rank = 0 if self.group is None else torch.distributed.get_rank(self.group)
        first = rank * width
        return first, min(max(self.vocab_size - first, 0), width)

    @property
    def split(self) -> bool:
        return self.group is not None and torch.distributed.get_world_size(self.group) > 1


def _chosen_rows(mask: Tensor | None, count: int | None) -> Tensor | None:
    """Flat positions [M] where the mask is not 0, ascending; None: all."""
    if mask is None:
        return None
    flat = mask.reshape(-1) != 0
    if count is None:
        return flat.nonzero().squeeze(1)
    # A stable sort puts the chosen positions first, in order, and its size is known without asking the GPU.
    return torch.sort(flat, descending=True, stable=True).indices[:count]


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, logits: Tensor, labels: Tensor, rows: Tensor | None, config: _Config
    ) -> tuple[Tensor, Tensor]:
        width = logits.shape[-1]
        flat = logits.detach().reshape(-1, width)  # [B*S, V/TP], no copy for contiguous logits
        chosen = labels.reshape(-1) if rows is None else labels.reshape(-1)[rows]  # [M]
        precise = _precise(logits.dtype)
        first, real = config.columns(width)

        # Per token: the largest local logit, the sum of exp around it, the label's logit (0 if another rank has it).
        maximum = torch.full((len(chosen),), -torch.inf, dtype=precise, device=logits.device)
        partial = torch.zeros(2, len(chosen), dtype=precise, device=logits.device)
        for part, values in _chunks(flat, rows, real, config.chunk_tokens, precise):
            if real:
                torch.amax(values, dim=1, out=maximum[part])
                local = chosen[part] - first
                here = (local >= 0) & (local < real)
                picked = values.gather(1, local.clamp(0, real - 1)[:, None]).squeeze(1)
                partial[1, part] = torch.where(here, picked, 0)
                partial[0, part] = values.sub_(maximum[part, None]).exp_().sum(dim=1)
        if config.split and len(chosen):
            # One MAX and one SUM for the whole micro-batch: local sums are moved to the common maximum afterwards.
            local_maximum = maximum.clone()
            torch.distributed.all_reduce(maximum, torch.distributed.ReduceOp.MAX, group=config.group)
            partial[0] *= (local_maximum - maximum).exp()
            torch.distributed.all_reduce(partial, group=config.group)
        normalizer, picked = partial  # [M] each
        log_probs = (picked - maximum) - normalizer.log()  # in this order: the difference of two large numbers first
        hits = picked >= maximum

        ctx.save_for_backward(logits, chosen, rows, maximum, normalizer)
        ctx.config = config
        hits = _scatter(hits, rows, labels.shape)
        ctx.mark_non_differentiable(hits)
        return _scatter(log_probs, rows, labels.shape), hits

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple:
        config: _Config = ctx.config
        logits, chosen, rows, maximum, normalizer = ctx.saved_tensors
        width = logits.shape[-1]
        precise = _precise(logits.dtype)
        first, real = config.columns(width)
        weight = grad.reshape(-1) if rows is None else grad.reshape(-1)[rows]  # [M]
        weight = weight.to(precise)

        flat = logits.detach().reshape(-1, width)
        # Each chunk is read before it is written, so the gradient may live where the logits were.
        result = flat if config.overwrite_logits else torch.empty_like(flat)
        for part, values in _chunks(flat, rows, real, config.chunk_tokens, precise):
            if real:
                values.sub_(maximum[part, None]).exp_().mul_(-(weight[part] / normalizer[part])[:, None])
                local = chosen[part] - first
                here = (local >= 0) & (local < real)
                values.scatter_add_(1, local.clamp(0, real - 1)[:, None], torch.where(here, weight[part], 0)[:, None])
            if rows is None:
                result[part, :real] = values
            else:
                result[rows[part], :real] = values.to(result.dtype)
        result[:, real:] = 0
        if rows is not None:
            skipped = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
            skipped[rows] = False
            result.masked_fill_(skipped[:, None], 0)
        return result.view_as(logits), None, None, None


def _chunks(flat: Tensor, rows: Tensor | None, real: int, chunk_tokens: int, precise: torch.dtype):
    """Yields (slice of the M chosen tokens, a fresh fp32 copy [chunk, real] of their logits)."""
    count = len(flat) if rows is None else len(rows)
    for start in range(0, count, chunk_tokens):
        part = slice(start, min(start + chunk_tokens, count))
        values = flat[part, :real] if rows is None else flat[rows[part]][:, :real]
        yield part, values.to(precise, copy=True)


def _scatter(values: Tensor, rows: Tensor | None, shape: torch.Size) -> Tensor:
    """[M] -> [B, S]; 0 where nothing was computed."""
    if rows is None:
        return values.view(shape)
    full = torch.zeros(shape.numel(), dtype=values.dtype, device=values.device)
    full[rows] = values
    return full.view(shape)


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
