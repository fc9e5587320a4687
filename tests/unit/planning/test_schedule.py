"""The order of passes is a schedule, and its time is the closed form where there is one."""

from __future__ import annotations

import pytest

from nemo_align.planning.schedule import PassSeconds, chunks_in_flight, order, step_seconds

LAYOUTS = [(1, 1, 5), (2, 1, 4), (4, 1, 3), (4, 1, 16), (2, 2, 4), (4, 3, 8), (12, 8, 36), (8, 12, 16)]


def even(pipeline: int, virtual: int) -> PassSeconds:
    """A micro-batch takes one second forward and two backward on every stage."""
    return PassSeconds([[1 / virtual] * virtual] * pipeline, [[2 / virtual] * virtual] * pipeline)


@pytest.mark.parametrize("pipeline, virtual, count", LAYOUTS)
def test_every_pass_happens_once_and_forward_comes_first(pipeline, virtual, count):
    for stage in range(pipeline):
        passes = order(stage, pipeline, virtual, count)
        assert len(passes) == len(set(passes)) == 2 * virtual * count
        place = {key: index for index, key in enumerate(passes)}
        for chunk in range(virtual):
            for micro_batch in range(count):
                assert place[(False, chunk, micro_batch)] < place[(True, chunk, micro_batch)]


@pytest.mark.parametrize("pipeline, virtual, count", LAYOUTS)
def test_held_activations_are_those_of_the_order(pipeline, virtual, count):
    for stage in range(pipeline):
        held = most = 0
        for backward, _, _ in order(stage, pipeline, virtual, count):
            held += -1 if backward else 1
            most = max(most, held)
        assert most == chunks_in_flight(stage, pipeline, virtual, count)


def test_the_papers_layout_holds_107_chunks():
    # 2 (p - 1) + (v - 1) p + 1: 96 chunks and a bubble's worth more.
    assert chunks_in_flight(0, 12, 8, 48) == 2 * 11 + 7 * 12 + 1


@pytest.mark.parametrize("pipeline, virtual, count", [case for case in LAYOUTS if case[2] >= case[0]])
def test_bubble_of_even_stages(pipeline, virtual, count):
    """(p - 1) / v micro-batches' worth: arXiv 2104.04473, sections 2.2.1 and 2.2.2."""
    expected = 3 * count + 3 * (pipeline - 1) / virtual
    assert step_seconds(even(pipeline, virtual), count, 0.0, beside=virtual > 1) == pytest.approx(expected)


def test_the_slowest_stage_sets_the_pace():
    times = PassSeconds([[1.0], [1.5], [1.0]], [[2.0], [3.0], [2.0]])
    few, many = step_seconds(times, 12, 0.0, beside=False), step_seconds(times, 112, 0.0, beside=False)
    assert many - few == pytest.approx(100 * 4.5)


@pytest.mark.parametrize("beside", [True, False])
def test_micro_batches_that_are_not_walked_add_the_same(beside, monkeypatch):
    times = PassSeconds([[0.5, 0.6], [0.5, 0.9]], [[1.0, 1.1], [1.2, 1.7]])
    short = step_seconds(times, 24, 0.01, beside=beside)
    monkeypatch.setattr("nemo_align.planning.schedule._WALKED_ROUNDS", 100)
    assert step_seconds(times, 24, 0.01, beside=beside) == pytest.approx(short, rel=1e-3)


def test_transfers_block_1f1b_and_delay_the_interleaved_schedule():
    def cost(virtual: int, beside: bool) -> float:
        times = even(4, virtual)
        return step_seconds(times, 40, 0.1, beside=beside) - step_seconds(times, 40, 0.0, beside=beside)

    blocking = cost(1, False)
    assert blocking > 40 * 2 * 0.1 * 0.9
    assert 0 < cost(2, True) < blocking < cost(2, False)
