"""The step plan: nothing lost, nothing twice, good packing, right counts."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from nemo_align.data.step_plan import StepPlan, pack, plan_step


def _random_case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    rng = np.random.default_rng(seed)
    segments = int(rng.integers(1, 3))
    lengths = rng.integers(1, 200, (300, segments)).astype(np.int32)
    indices = rng.integers(0, 300, int(rng.integers(1, 90)))  # with repeats, as at an epoch border
    settings = {
        "capacity": int(rng.integers(400, 1200)),
        "data_parallel": int(rng.integers(1, 6)),
        "packing": bool(rng.integers(2)),
        "micro_batch_size": int(rng.integers(1, 4)),
        "multiple_of": int(rng.integers(1, 4)),
        "pad_to": int(rng.choice([1, 8, 16])),
        "fixed_length": bool(rng.integers(2)),
        "crossover_length": int(rng.choice([10, 24576])),
    }
    return indices, lengths, lengths.sum(axis=1) // 2, settings


def _fills(plan: StepPlan, lengths: np.ndarray) -> list[int]:
    return [sum(int(lengths[i].sum()) for i in batch) for rank in plan.micro_batches for batch in rank]


@pytest.mark.parametrize("seed", range(60))
def test_properties(seed: int) -> None:
    indices, lengths, loss_tokens, settings = _random_case(seed)
    plan = plan_step(indices, lengths, loss_tokens, **settings)
    placed = Counter(i for rank in plan.micro_batches for batch in rank for i in batch)
    assert placed == Counter(indices.tolist())

    assert len(plan.micro_batches) == settings["data_parallel"]
    assert {len(rank) for rank in plan.micro_batches} == {plan.num_micro_batches}
    assert plan.num_micro_batches % settings["multiple_of"] == 0 and plan.length % settings["pad_to"] == 0
    fills = _fills(plan, lengths)
    per_row = settings["capacity"] * (1 if settings["packing"] else settings["micro_batch_size"])
    assert max(fills) <= min(plan.length, per_row)
    slack = plan.length - (per_row if settings["fixed_length"] else max(fills))
    assert 0 <= slack < settings["pad_to"]  # the tightest multiple
    if not settings["packing"]:
        assert max(len(batch) for rank in plan.micro_batches for batch in rank) <= settings["micro_batch_size"]

    chosen = lengths[indices].astype(np.int64)
    assert plan.examples == len(indices) and plan.real_tokens == chosen.sum()
    assert plan.squared_tokens == (chosen**2).sum() and plan.loss_tokens == loss_tokens[indices].sum()
    num_rows = settings["data_parallel"] * plan.num_micro_batches
    assert plan.padded_tokens == plan.length * num_rows
    padding = sum((plan.length - fill) ** 2 for fill in fills)
    assert plan.padded_squared_tokens == plan.squared_tokens + padding
    assert plan_step(indices, lengths, loss_tokens, **settings) == plan


@pytest.mark.parametrize("seed", range(20))
def test_no_more_micro_batches_than_best_fit_needs(seed: int) -> None:
    """Micro-batches per rank follow from the number of bins alone; bins are within 5 % (+1) of the lower bound."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 2000, 256)
    capacity = 4096
    bound = -(-int(sizes.sum()) // capacity)
    bins = pack(sizes.tolist(), capacity)
    assert sorted(i for members in bins for i in members) == list(range(256))
    assert all(sizes[members].sum() <= capacity for members in bins)
    assert len(bins) <= 1.05 * bound + 1
    plan = plan_step(np.arange(256), sizes[:, None], sizes, capacity=capacity, data_parallel=4)
    assert plan.num_micro_batches == -(-len(bins) // 4)


def test_pack_is_optimal_where_every_bin_can_be_filled() -> None:
    assert len(pack([600, 400, 500, 500, 700, 300, 1000], 1000)) == 4


def test_work_is_even_over_ranks() -> None:
    """Long examples cost more attention than as many tokens in short ones; no rank may get all of them."""
    lengths = np.array([[4096]] * 8 + [[512]] * 64)
    plan = plan_step(
        np.arange(72), lengths, lengths[:, 0], capacity=4096, data_parallel=4, fixed_length=True, crossover_length=1000
    )
    long_per_rank = [sum(len(batch) == 1 for batch in rank) for rank in plan.micro_batches]
    assert plan.num_micro_batches == 4 and long_per_rank == [2, 2, 2, 2]


def test_spare_micro_batches_shorten_the_step() -> None:
    """Ten examples fit one micro-batch, but two ranks need one each: five and five, not ten and none."""
    lengths = np.full((10, 1), 100)
    plan = plan_step(np.arange(10), lengths, lengths[:, 0], capacity=2048, data_parallel=2)
    assert [len(rank[0]) for rank in plan.micro_batches] == [5, 5]
    assert plan.length == 500 and plan.padded_tokens == plan.real_tokens


def test_empty_micro_batches_where_examples_are_too_few() -> None:
    lengths = np.full((3, 2), 10)
    plan = plan_step([0, 1, 2], lengths, np.ones(3), capacity=64, data_parallel=2, multiple_of=4)
    counts = sorted(len(batch) for rank in plan.micro_batches for batch in rank)
    assert counts == [0, 0, 0, 0, 0, 1, 1, 1] and plan.num_micro_batches == 4


def test_too_long_an_example_is_named() -> None:
    with pytest.raises(ValueError, match=r"example 7 has 31 tokens.*micro_batch_tokens to at least 31"):
        plan_step([3, 7], np.array([[1]] * 7 + [[31]]), np.ones(8), capacity=30)


def test_fast_enough_for_the_host_of_a_training_step() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 2000, (10000, 1)).astype(np.int32)
    seconds = []
    for _ in range(5):
        indices = rng.integers(0, 10000, 256)
        start = time.process_time()
        plan_step(indices, lengths, lengths[:, 0], capacity=4096, data_parallel=8)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 5e-3
