"""Greedy pairwise (strength 2) covering arrays, deterministic, for factors with constraints between them.

Factors come in blocks. A block is the list of its feasible combinations, each a dict from factor to level; constraints
live inside of blocks, and any combination of one block goes with any of another. A case takes one combination of each
block. The array covers every pair of levels that some feasible case has.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

Case = dict[str, Any]
Block = list[Case]
Level = tuple[str, Any]

_STARTS = 6  # random starts of the search for each case; more give slightly smaller arrays


def number_of_cases(blocks: list[Block]) -> int:
    """All feasible cases."""
    return math.prod(len(block) for block in blocks)


def feasible_pairs(blocks: list[Block]) -> set[frozenset[Level]]:
    """Every pair of levels of two factors that some feasible case has."""
    pairs = {
        frozenset(pair)
        for block in blocks
        for combination in block
        for pair in itertools.combinations(combination.items(), 2)
    }
    levels = [{level for combination in block for level in combination.items()} for block in blocks]
    for first, second in itertools.combinations(levels, 2):
        pairs |= {frozenset(pair) for pair in itertools.product(first, second)}
    return pairs


def pairs_of(case: Case) -> set[frozenset[Level]]:
    return {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}


def covering_array(blocks: list[Block], seed: int = 0) -> list[Case]:
    """Cases that cover every feasible pair. Each is the best found by improving one block at a time."""
    chance = random.Random(seed)
    number = {level: place for place, level in enumerate(_levels(blocks))}
    masks = [[sum(1 << number[level] for level in combination.items()) for combination in block] for block in blocks]
    members = [[[number[level] for level in combination.items()] for combination in block] for block in blocks]
    left = [0] * len(number)  # per level: the levels whose pair with it is not covered yet
    for pair in feasible_pairs(blocks):
        one, other = (number[level] for level in pair)
        left[one] |= 1 << other
        left[other] |= 1 << one

    def gain(block: int, combination: int, rest: int) -> int:
        own = masks[block][combination]
        # A pair inside of the block is seen from both of its levels, one with another block from one.
        return sum(
            2 * (left[level] & rest).bit_count() + (left[level] & own).bit_count()
            for level in members[block][combination]
        )

    def improved(chosen: list[int]) -> tuple[int, list[int]]:
        while True:
            before = list(chosen)
            for block in range(len(blocks)):
                rest = sum(masks[other][chosen[other]] for other in range(len(blocks)) if other != block)
                chosen[block] = max(range(len(blocks[block])), key=lambda c, b=block, r=rest: (gain(b, c, r), -c))
            if chosen == before:
                covered = sum(masks[block][combination] for block, combination in enumerate(chosen))
                new = sum((left[level] & covered).bit_count() for level in range(len(left)) if covered >> level & 1)
                return new, chosen

    cases = []
    while any(left):
        # One start at a level with many pairs left, so that each case covers something new.
        neediest = max(range(len(left)), key=lambda level: left[level].bit_count())
        starts = []
        for start in range(_STARTS):
            chosen = [chance.randrange(len(block)) for block in blocks]
            if start == 0:
                chosen = _with_new_pair(masks, left, neediest, chosen)
            starts.append(improved(chosen))
        new, chosen = max(starts, key=lambda found: found[0])
        assert new > 0
        mask = sum(masks[block][combination] for block, combination in enumerate(chosen))
        for level in range(len(left)):
            if mask >> level & 1:
                left[level] &= ~mask
        cases.append({key: value for block, c in zip(blocks, chosen, strict=True) for key, value in block[c].items()})
    return cases


def each_level_once(cases: list[Case]) -> list[Case]:
    """A few of the cases that have every level among them: repeatedly the one with most levels that are missing."""
    missing = {level for case in cases for level in case.items()}
    chosen: list[Case] = []
    while missing:
        best = max(cases, key=lambda case: len(missing & set(case.items())))
        chosen.append(best)
        missing -= set(best.items())
    return chosen


def _levels(blocks: list[Block]) -> list[Level]:
    seen: dict[Level, None] = {}
    for block in blocks:
        for combination in block:
            seen |= dict.fromkeys(combination.items())
    return list(seen)


def _with_new_pair(masks: list[list[int]], left: list[int], level: int, chosen: list[int]) -> list[int]:
    """`chosen`, changed to hold a pair of `level` that is not covered yet."""
    chosen = list(chosen)
    wanted = left[level] & -left[level]  # its first missing partner
    both = 1 << level | wanted
    home = {block for block, combinations in enumerate(masks) for mask in combinations if mask & both}
    for block in home:
        here = both & ~sum(1 << bit for bit in range(both.bit_length()) if not any(m >> bit & 1 for m in masks[block]))
        chosen[block] = next(number for number, mask in enumerate(masks[block]) if mask & here == here)
    return chosen
