"""The step plan: which examples go into which micro-batch of which data-parallel rank.

Every rank computes the same plan from the same integers, so no rank has to be told; the packing decides how fast a
step is and never what it computes, because losses are divided by the plan's global counts.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Length at which a token's attention costs as much as its matrix weights when nothing else is known:
# weights of a layer / (2 x heads x head_dim), about 6 x hidden for a decoder with ffn = 4 x hidden.
DEFAULT_CROSSOVER_LENGTH = 24576


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step (or one batch of an evaluation), the same object on every rank."""

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]  # [data rank][k] -> dataset indices; () is an empty one
    length: int  # tokens of every micro-batch row, padding included
    examples: int  # of the global batch
    real_tokens: int  # of all examples
    squared_tokens: int  # sum of squared segment lengths
    padded_tokens: int  # what the hardware is given: all rows of all ranks, empty micro-batches too
    padded_squared_tokens: int  # the same for attention: padding attends to padding
    loss_tokens: int  # tokens that are predicted
    num_micro_batches: int  # per data-parallel rank


@dataclass(frozen=True, kw_only=True)
class StepLayout:
    """How a step may be laid out; the keywords of `plan_step`."""

    capacity: int  # tokens of a packed micro-batch (`train.micro_batch_tokens`), or of one example without packing
    data_parallel: int = 1
    packing: bool = True
    micro_batch_size: int = 1  # examples in a micro-batch without packing
    multiple_of: int = 1  # of micro-batches per rank: the pipeline size if the schedule is interleaved
    pad_to: int = 1  # the common length is a multiple of this
    fixed_length: bool = False  # one length for all steps: changing shapes cost a GPU more than padding
    crossover_length: int = DEFAULT_CROSSOVER_LENGTH


def plan_step(
    indices: Sequence[int] | np.ndarray,
    lengths: np.ndarray,
    loss_tokens: np.ndarray,
    *,
    capacity: int,
    data_parallel: int = 1,
    packing: bool = True,
    micro_batch_size: int = 1,
    multiple_of: int = 1,
    pad_to: int = 1,
    fixed_length: bool = False,
    crossover_length: int = DEFAULT_CROSSOVER_LENGTH,
) -> StepPlan:
    """Lay the examples `indices` (an example may appear twice at an epoch border) into micro-batches.

    lengths: tokens [N, segments] of the whole dataset; loss_tokens: [N]. With packing, examples share a micro-batch as
    long as their tokens fit `capacity`; without, each micro-batch takes `micro_batch_size` of them in order and
    has room for `capacity` tokens of each. Raises ValueError for an example longer than `capacity`.
    """
    indices = np.asarray(indices, dtype=np.int64)
    segments = np.asarray(lengths)[indices].astype(np.int64)  # [n, segments]
    tokens = segments.sum(axis=1)  # [n]
    _refuse_too_long(indices, tokens, capacity)

    sizes = tokens.tolist()
    if packing:
        bins = pack(sizes, capacity)
        row_capacity = capacity
    else:
        bins = [
            list(range(start, min(start + micro_batch_size, len(sizes))))
            for start in range(0, len(sizes), micro_batch_size)
        ]
        row_capacity = capacity * micro_batch_size
    count = _round_up(max(1, -(-len(bins) // data_parallel)), multiple_of)  # micro-batches per rank
    if packing:
        bins = _spread(sizes, count * data_parallel, capacity) or bins

    fills = [sum(sizes[i] for i in members) for members in bins]
    length = _round_up(row_capacity if fixed_length else max(fills, default=1), pad_to)
    squares = (segments**2).sum(axis=1).tolist()
    attention = [
        sum(squares[i] for i in members) + (length - fill) ** 2 for members, fill in zip(bins, fills, strict=True)
    ]
    costs = [crossover_length * length + work for work in attention]
    num_empty = count * data_parallel - len(bins)
    ranks = _assign(costs, data_parallel, count)

    return StepPlan(
        micro_batches=tuple(
            tuple(tuple(int(indices[i]) for i in sorted(bins[b])) for b in rank) + ((),) * (count - len(rank))
            for rank in ranks
        ),
        length=length,
        examples=len(sizes),
        real_tokens=int(tokens.sum()),
        squared_tokens=int(sum(squares)),
        padded_tokens=length * count * data_parallel,
        padded_squared_tokens=int(sum(attention)) + num_empty * length**2,
        loss_tokens=int(np.asarray(loss_tokens)[indices].sum(dtype=np.int64)),
        num_micro_batches=count,
    )


def plan_windows(indices: Sequence[int] | np.ndarray, predicted: Sequence[int], layout: StepLayout) -> StepPlan:
    """Pretraining: samples of `layout.capacity` tokens, `layout.micro_batch_size` rows in each micro-batch.

    predicted [n]: tokens of each sample, below capacity only for the tail of a held-out set. Micro-batches are cut from
    the batch in order and dealt to the ranks in turn: number k of rank d is number k * data_parallel + d of the batch.
    Rows that are missing at the end of a short batch are padding.
    """
    size, length = layout.micro_batch_size, layout.capacity
    order = [int(index) for index in indices]
    cuts = [tuple(order[start : start + size]) for start in range(0, len(order), size)]
    count = _round_up(max(1, -(-len(cuts) // layout.data_parallel)), layout.multiple_of)
    cuts += [()] * (count * layout.data_parallel - len(cuts))
    num_rows = len(cuts) * size
    tokens = sum(predicted)
    return StepPlan(
        micro_batches=tuple(tuple(cuts[rank :: layout.data_parallel]) for rank in range(layout.data_parallel)),
        length=length,
        examples=len(order),
        real_tokens=tokens,
        squared_tokens=sum(number**2 for number in predicted),
        padded_tokens=num_rows * length,
        padded_squared_tokens=num_rows * length**2,
        loss_tokens=tokens,
        num_micro_batches=count,
    )


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: positions of `sizes` in as few bins of `capacity` as that rule finds (at most 11/9 of the
    optimum; Johnson 1973). Ties go to the earlier position, so every rank gets the same bins."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), sorted
    for position in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[position]
        at = bisect_left(free, (size, -1))
        if at < len(free):
            room, chosen = free.pop(at)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(position)
        insort(free, (room - size, chosen))
    return bins


def _spread(sizes: Sequence[int], num_bins: int, capacity: int) -> list[list[int]] | None:
    """The same examples over exactly `num_bins` bins, as evenly as longest-first finds; None if one would overflow.

    The number of micro-batches is fixed by now, so even bins mean a shorter common length and no empty micro-batch."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, b) for b in range(num_bins)]
    for position in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fill, chosen = heap[0]
        if fill + sizes[position] > capacity:
            return None
        heapq.heapreplace(heap, (fill + sizes[position], chosen))
        bins[chosen].append(position)
    return [members for members in bins if members]


def _assign(costs: Sequence[int], num_ranks: int, count: int) -> list[list[int]]:
    """Micro-batches to ranks, costliest first to the rank with the least work, at most `count` each."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    heap = [(0, 0, rank) for rank in range(num_ranks)]
    for micro_batch in sorted(range(len(costs)), key=lambda b: (-costs[b], b)):
        work, held, rank = heapq.heappop(heap)
        ranks[rank].append(micro_batch)
        if held + 1 < count:  # a full rank leaves the heap
            heapq.heappush(heap, (work + costs[micro_batch], held + 1, rank))
    return ranks


def _refuse_too_long(indices: np.ndarray, tokens: np.ndarray, capacity: int) -> None:
    too_long = np.flatnonzero(tokens > capacity)
    if too_long.size:
        first = int(too_long[0])
        raise ValueError(
            f"example {int(indices[first])} has {int(tokens[first])} tokens, more than a micro-batch holds "
            f"({capacity}); set micro_batch_tokens to at least {int(tokens.max())}, or shorten the rows with "
            "data.sequence_length and data.overlong"
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
