"""Order of the rows of Megatron-core's fused query-key-value matrix.

With H query heads, G groups and p = H / G queries per group, group g holds the rows of query heads p*g .. p*g + p - 1,
then the key head g, then the value head g, each D = head size rows. Neither side interleaves a head's rows.
"""

from __future__ import annotations

from nemo_align.checkpoint.streaming.tensors import Joined, RowSource, Slice


def group(query: RowSource, key: RowSource, value: RowSource, *, num_groups: int, head_dim: int) -> Joined:
    """Fuse query [H*D, hidden], key [G*D, hidden] and value [G*D, hidden] to [(H + 2G)*D, hidden]."""
    parts = (query, key, value)
    total = sum(part.shape[0] for part in parts)
    num_heads = query.shape[0] // head_dim
    rows = sources(0, total, num_heads=num_heads, num_groups=num_groups, head_dim=head_dim)
    return Joined([Slice(parts[which], first, last) for which, first, last in rows])


def ungroup(fused: RowSource, *, num_groups: int, head_dim: int) -> tuple[Joined, Joined, Joined]:
    """The inverse of `group`: query, key, value."""
    rows = fused.shape[0] // num_groups  # of one group
    queries = rows - 2 * head_dim
    borders = ((0, queries), (queries, queries + head_dim), (queries + head_dim, rows))
    query, key, value = (
        Joined([Slice(fused, number * rows + first, number * rows + last) for number in range(num_groups)])
        for first, last in borders
    )
    return query, key, value


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
