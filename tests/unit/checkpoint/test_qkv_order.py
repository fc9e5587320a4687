"""Rows of the fused query-key-value matrix against the published layout."""

from __future__ import annotations

import itertools

import pytest
import torch

from nemo_align.checkpoint.huggingface import qkv
from nemo_align.checkpoint.streaming.tensors import HeldTensor, read

SHAPES = [(96, 8, 2), (4, 2, 12), (6, 6, 4), (8, 1, 3), (48, 8, 1)]


def numbered(heads: int, groups: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value whose entries are 1000 x kind + row."""
    counts = (heads * size, groups * size, groups * size)
    return tuple(1000.0 * kind + torch.arange(count).float()[:, None] for kind, count in enumerate(counts))


def group(parts: tuple[torch.Tensor, ...], groups: int, size: int) -> torch.Tensor:
    return read(qkv.group(*map(HeldTensor, parts), num_groups=groups, head_dim=size))


def test_nemotron_4_340b() -> None:
    """96 heads, 8 groups: 112 rows of heads, K rows = arange(12, 112, 14), V rows = K rows + 1."""
    fused = group(numbered(96, 8, 1), 8, 1)[:, 0]
    assert fused.shape == (112,)
    keys = torch.arange(12, 112, 14)
    assert fused[keys].tolist() == [1000.0 + group for group in range(8)]
    assert fused[keys + 1].tolist() == [2000.0 + group for group in range(8)]
    queries = [row for row in range(112) if row % 14 < 12]
    assert fused[queries].tolist() == list(range(96))
    # A shard of TP 8 is exactly one group: 14 heads, 2688 rows of head size 192.
    assert qkv.sources(2688 * 3, 2688 * 4, num_heads=96, num_groups=8, head_dim=192) == [
        (0, 12 * 3 * 192, 12 * 4 * 192),
        (1, 3 * 192, 4 * 192),
        (2, 3 * 192, 4 * 192),
    ]


@pytest.mark.parametrize("heads, groups, size", SHAPES)
def test_ungroup_is_the_inverse(heads: int, groups: int, size: int) -> None:
    parts = tuple(torch.randn(count * size, 5) for count in (heads, groups, groups))
    back = qkv.ungroup(HeldTensor(group(parts, groups, size)), num_groups=groups, head_dim=size)
    assert all(torch.equal(read(found), part) for found, part in zip(back, parts, strict=True))


@pytest.mark.parametrize("heads, groups, size", SHAPES)
@pytest.mark.parametrize("cuts", [1, 2, 3, 7])
def test_sources_cut_anywhere_give_the_rows_of_the_whole(heads: int, groups: int, size: int, cuts: int) -> None:
    parts = numbered(heads, groups, size)
    whole = group(parts, groups, size)
    borders = [round(len(whole) * cut / cuts) for cut in range(cuts + 1)]
    rows = []
    for first, last in itertools.pairwise(borders):
        for which, begin, end in qkv.sources(first, last, num_heads=heads, num_groups=groups, head_dim=size):
            rows.append(parts[which][begin:end])
    assert torch.equal(torch.cat(rows), whole)
