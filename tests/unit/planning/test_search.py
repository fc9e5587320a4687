"""The best layouts, and the layout on more GPUs."""

from __future__ import annotations

import pytest

from nemo_align.config.compose import compose
from nemo_align.planning import h100
from nemo_align.planning.estimate import estimate
from nemo_align.planning.plan import search_layouts
from nemo_align.planning.report import print_search
from nemo_align.planning.scaling import scaling
from nemo_align.planning.search import _layouts, near_sizes, search
from nemo_align.planning.variants import problems
from tests.unit.planning.stages import planned, pretrain_stage


def test_the_best_are_those_of_trying_everything():
    stage = pretrain_stage(["search=true", "gpus=16", "model=minitron_4b", "train.global_batch_size=64"])
    found = search(stage, 64, None, 16, 5)
    everything = []
    for candidate in _layouts(stage, 16):
        if not problems(candidate):
            tried = estimate(candidate, 64, None)
            if tried.memory.fits:
                everything.append(tried.time.total)
    assert [best.time.total for best in found.best] == pytest.approx(sorted(everything)[:5])
    assert found.fitting == len(everything) <= found.tried


def test_ranked_layouts_fit_and_use_all_gpus():
    stage = planned(["search=true", "gpus=1536"]).stage
    found = search(stage, 768, None, 1536, 5)
    seconds = [best.time.total for best in found.best]
    assert seconds == sorted(seconds) and len(seconds) == 5
    assert all(best.memory.fits and best.job.world_size == 1536 for best in found.best)
    assert all(best.job.parallel.tensor == 8 for best in found.best)  # nothing less holds the 340B at this size


def test_too_few_gpus_hold_nothing():
    stage = planned(["search=true", "gpus=16"]).stage
    found = search(stage, 768, None, 16, 5)
    assert found.best == [] and found.first is None
    assert found.least_bytes is not None and found.least_bytes > h100.CARD_BYTES


def test_numbers_that_no_layout_can_use_have_neighbours_that_can():
    stage = planned(["search=true", "gpus=1536"]).stage
    assert near_sizes(stage, 1530) == [1536]


RECIPES = {
    "nemotron4_340b/code_sft": 192,  # whose own layout recomputes
    "nemotron4_15b/dpo": 8,  # whose micro-batches are shorter
    "nemotron4_340b/pretrain": 6144,  # whose layout names its replicas
}


@pytest.mark.parametrize("experiment", RECIPES)
def test_the_first_as_overrides_is_the_first(experiment, capsys):
    arguments = [f"+experiment={experiment}", f"gpus={RECIPES[experiment]}"]
    asked = compose("plan", [*arguments, "search=true", "top=1"])
    result = search_layouts(asked)
    print_search(result)
    said = capsys.readouterr().out.rpartition("the first as overrides: ")[2].split()
    assert said[0] == arguments[1]
    again = compose("plan", [arguments[0], *said])
    again = estimate(again.stage, result.length.batches[-1].size, result.length.lengths)
    (first,) = result.found.best
    assert again.time.total == first.time.total and again.memory.largest == first.memory.largest


def test_weak_scaling_keeps_the_micro_batches_and_strong_divides_them():
    found = scaling(pretrain_stage(["parallel=tp8_pp12", "gpus=1536"]), 768, None)
    assert [row.gpus for row in found.weak] == [96 * 2**power for power in range(9)]
    assert {row.estimate.job.work.micro_batches for row in found.weak if row.estimate} == {48}
    strong = {row.gpus: row.estimate for row in found.strong}
    assert [strong[gpus].job.work.micro_batches for gpus in (96, 1536, 6144)] == [768, 48, 12]
    assert strong[24576] is None  # 3 micro-batches a replica are no multiple of 12
    assert strong[6144].mfu < strong[1536].mfu < strong[96].mfu
