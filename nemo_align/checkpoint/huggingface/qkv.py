"""Order of the rows of Megatron-core's fused query-key-value matrix.

With H query heads, G groups and p = H / G queries per group, group g holds the rows of query heads p*g .. p*g + p - 1,
then the key head g, then the value head g, each D = head size rows. Neither side interleaves a head's rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group(query: Tensor, key: Tensor, value: Tensor, *, num_groups: int, head_dim: int) -> Tensor:
    """Fuse query [H*D, hidden], key [G*D, hidden] and value [G*D, hidden] to [(H + 2G)*D, hidden]."""
    hidden = query.shape[-1]
    parts = [
        part.reshape(num_groups, -1, head_dim, hidden) for part in (query, key, value)
    ]  # [G, p | 1 | 1, D, hidden]
    return torch.cat(parts, dim=1).reshape(-1, hidden)


def ungroup(fused: Tensor, *, num_groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `group`: query, key, value."""
    hidden = fused.shape[-1]
    parts = fused.reshape(num_groups, -1, head_dim, hidden)  # [G, p + 2, D, hidden]
    query, key, value = parts[:, :-2], parts[:, -2], parts[:, -1]
    return query.reshape(-1, hidden), key.reshape(-1, hidden), value.reshape(-1, hidden)


def sources(first: int, last: int, *, num_heads: int, num_groups: int, head_dim: int) -> list[tuple[int, int, int]]:
    """Where rows [first, last) of the fused matrix come from: in order: (0 query | 1 key | 2 value, first, last).

    For a tensor-parallel rank that reads only its own rows; the borders may fall inside a head.
    """
    queries = num_heads // num_groups
    found: list[tuple[int, int, int]] = []
    row = first
    while row < last:
        head, within = divmod(row, head_dim)
        number, place = divmod(head, queries + 2)
        length = min(last - row, head_dim - within)
        which = max(0, place - queries + 1)
        begin = (number * queries + place if which == 0 else number) * head_dim + within
        if found and found[-1][0] == which and found[-1][2] == begin:
            found[-1] = (which, found[-1][1], begin + length)
        else:
            found.append((which, begin, begin + length))
        row += length
    return found
