"""Memory by part in closed form, and how it moves with the layout."""

from __future__ import annotations

import pytest

from nemo_align.config.runtime import PrecisionConfig
from nemo_align.planning.activations import chunk_bytes, layer_bytes, layer_parts
from nemo_align.planning.advice import changes_that_fit
from nemo_align.planning.memory import memory_plan
from tests.unit.planning.jobs import job
from tests.unit.planning.stages import pretrain_stage

GB = 1e9


def largest(**layout) -> float:
    return memory_plan(job(**layout)).largest.total


def test_states_of_the_last_stage_are_those_of_the_closed_form():
    # PP 12, DP 16: 2 + 4 + 12/16 bytes for each of 4,044,460,032 parameters: 27.3 GB.
    last = memory_plan(job()).stages[-1]
    assert last.weights == 2 * 4_044_460_032
    assert last.gradients == 4 * 4_044_460_032
    assert last.optimizer == 12 * 4_044_460_032 / 16
    assert last.model_states == pytest.approx(27.3 * GB, rel=2e-3)


def test_activations_of_a_layer():
    """Per token 8 h + 2 (q + 2k) + 2 q + 4 f bytes and 4 a head, over 8 ranks under sequence parallelism."""
    h, q, k, f, heads = 18432, 18432, 1536, 73728, 96
    assert sum(layer_parts(job()).values()) == (8 * h + 2 * (q + 2 * k) + 2 * q + 4 * f + 4 * heads) / 8
    assert layer_bytes(job()) == pytest.approx(267.6e6, rel=1e-3)


def test_without_sequence_parallelism_the_norms_keep_whole_rows():
    parts, split = layer_parts(job(sequence=False)), layer_parts(job())
    assert parts["residual stream"] == 8 * split["residual stream"]
    assert parts["squared ReLU"] == split["squared ReLU"]


def test_interleaving_holds_more_than_1f1b():
    # 1 + (p - 1) / (p v) of the activations: arXiv 2205.05198, section 4.2.3.
    plain, interleaved = memory_plan(job(virtual_pipeline=1)), memory_plan(job())
    ratio = interleaved.stages[0].activations / plain.stages[0].activations
    assert ratio == pytest.approx(1 + 11 / 96, rel=0.01)
    assert plain.in_flight == [12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1]


def test_full_recomputation_keeps_the_input_of_each_block():
    block = 4096 * 2 * 18432 / 8
    assert chunk_bytes(job(virtual_pipeline=1, recompute="full")) == 8 * block
    assert chunk_bytes(job(virtual_pipeline=1, recompute="full", recompute_layers=4)) == 2 * block
    recomputed = memory_plan(job(virtual_pipeline=1, recompute="full", recompute_layers=4)).largest.recomputed
    assert recomputed == 4 * layer_bytes(job())


@pytest.mark.parametrize(
    "more, less",
    [
        ({"tensor": 4}, {"tensor": 8}),
        ({"pipeline": 6}, {"pipeline": 12}),
        ({"data": 1}, {"data": 2}),
        ({"distributed_optimizer": False}, {}),
        ({}, {"recompute": "selective"}),
        ({"recompute": "selective"}, {"recompute": "full"}),
        ({"sequence": False}, {"sequence": True}),
        ({"virtual_pipeline": 8}, {"virtual_pipeline": 1}),
        ({"rows": 2}, {"rows": 1}),
        ({"length": 8192}, {"length": 4096}),
        ({}, {"precision": PrecisionConfig(grad_reduce_fp32=False)}),
        ({"precision": PrecisionConfig(fp8="delayed")}, {}),  # copies of weights weigh more than inputs in FP8 save
    ],
)
def test_memory_moves_the_right_way(more, less):
    assert largest(**more) > largest(**less)


def test_the_papers_layout_fits_and_one_replica_does_not():
    for data, batch in ((16, 768), (32, 1536), (64, 2304)):
        assert memory_plan(job(batch, data=data)).verdict == "fits"
    assert memory_plan(job(data=1)).verdict == "does not fit"


def test_logits_lie_on_the_last_stage_only_and_a_reward_model_has_none():
    stages = memory_plan(job()).stages
    assert [stage.logits_and_loss > 0 for stage in stages] == [False] * 11 + [True]
    assert stages[-1].logits_and_loss > 4096 * 32000 * 2


def test_fp8_keeps_inputs_of_products_in_a_byte():
    parts, wide = layer_parts(job(precision=PrecisionConfig(fp8="tensorwise"))), layer_parts(job())
    assert 2 * parts["inputs of QKV and fc1"] == wide["inputs of QKV and fc1"]
    assert parts["residual stream"] == wide["residual stream"]
    stages = memory_plan(job(precision=PrecisionConfig(fp8="tensorwise"))).stages
    assert stages[1].fp8_copies == 2 * 3_454_009_344
    assert stages[0].fp8_copies == stages[-1].fp8_copies == 2 * 3_454_009_344 * 7 / 8  # its first layer is in bf16


def test_advice_fits_and_is_near():
    stage = pretrain_stage(["parallel=tp8_pp12", "gpus=96"])
    changes = changes_that_fit(stage, 768, None)
    assert changes and all(change.estimate.memory.fits for change in changes)
    assert ["parallel.recompute=full"] in [change.overrides for change in changes]
    assert [change.estimate.job.world_size for change in changes] == sorted(
        change.estimate.job.world_size for change in changes
    )
