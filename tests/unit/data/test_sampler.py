"""The sampler: a permutation per epoch, addressed by an integer."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_align.data.sampler import EpochSampler

GOLDEN = [1, 6, 2, 0, 3, 5, 7, 4, 3, 6, 7, 0, 5, 4, 1, 2]


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    sampler = EpochSampler(100, seed=5)
    epochs = [sampler.batch(100 * epoch, 100) for epoch in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(100)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[0], np.arange(100))
    assert not np.array_equal(EpochSampler(100, seed=6).batch(0, 100), epochs[0])


@pytest.mark.parametrize("batch_size", [1, 7, 32, 250])
def test_the_order_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    """Nor on what was asked before: a resumed run continues the same sequence, across epoch borders."""
    whole = EpochSampler(100, seed=1).batch(0, 1000)
    parts = [EpochSampler(100, seed=1).batch(start, batch_size) for start in range(0, 1000, batch_size)]
    assert np.array_equal(np.concatenate(parts)[:1000], whole)


def test_golden_order() -> None:
    """Runs made with another numpy must resume in the same order."""
    assert EpochSampler(8, seed=1234).batch(0, 16).tolist() == GOLDEN


def test_memory_is_two_permutations() -> None:
    sampler = EpochSampler(10, seed=0)
    for consumed in range(0, 100, 5):
        sampler.batch(consumed, 8)
        assert len(sampler._permutations) <= 2


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="no examples"):
        EpochSampler(0, seed=0)
