"""Every stage computes the same under every layout: loss, gradient norm and all metrics of three steps.

The runs go through the stages' entry points on real gloo processes, from one checkpoint that one process wrote. Bounds:
fp32 sums in another order differ in the last bits (measured at most a few 1e-6 relative in the loss); gradient norms
add squares over more terms, and what the updates carry over grows with the steps.
"""

import pytest

from tests.distributed.checkpoint_runs import assert_equal, weights_of
from tests.distributed.stage_runs import numbers, run_stage
from tests.stage_inputs import stage_overrides

LAYOUTS = {
    "tp2": {"tensor": 2},
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2_vp2": {"pipeline": 2, "virtual_pipeline": 2},
    "dp2": {"data": 2},
    "dp2_replicated_optimizer": {"data": 2, "distributed_optimizer": False},
}
STAGES = {
    "pretrain": ("pretrain", []),
    "sft": ("sft", []),
    "reward": ("reward", []),
    "dpo": ("preference", ["preference.sft_loss_weight=0.01"]),
    "ipo": ("preference", ["preference.preference_loss=ipo", "preference.preference_average_log_probs=true"]),
    "rpo_bwd_kl": ("preference", ["preference.preference_loss=rpo_bwd_kl"]),
    "rpo_fwd_kl": ("preference", ["preference.preference_loss=rpo_fwd_kl"]),
    "rpo_sq": ("preference", ["preference.preference_loss=rpo_sq"]),
}


@pytest.fixture(scope="module")
def one_process(pool1, stage_inputs, policy, tmp_path_factory):
    """Records of each stage under one process, run when first asked for."""
    runs: dict[str, list[dict]] = {}

    def records(stage: str) -> list[dict]:
        if stage not in runs:
            verb, extra = STAGES[stage]
            overrides = [*stage_overrides(stage_inputs, verb), *extra, f"checkpoint.init_from={policy}"]
            runs[stage] = run_stage(pool1, verb, tmp_path_factory.mktemp(stage), overrides)
        return runs[stage]

    return records


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_layout_changes_nothing_but_rounding(stage, layout, pool2, one_process, stage_inputs, policy, tmp_path):
    verb, extra = STAGES[stage]
    overrides = [*stage_overrides(stage_inputs, verb), *extra, f"checkpoint.init_from={policy}"]
    records = run_stage(pool2, verb, tmp_path, overrides, LAYOUTS[layout])
    expected, actual = numbers(one_process(stage), "train"), numbers(records, "train")
    assert len(actual) == 3
    for before, after in zip(expected, actual, strict=True):
        assert after == pytest.approx(before, rel=2e-4, abs=2e-5)
        assert after["loss"] == pytest.approx(before["loss"], rel=2e-5, abs=2e-6)
    held_out = zip(numbers(one_process(stage), "validation"), numbers(records, "validation"), strict=True)
    for before, after in held_out:
        assert after == pytest.approx(before, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("extra", [["train.packing=false"], ["train.packing=false", "train.micro_batch_size=4"]])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_packing_and_micro_batches_change_nothing_but_rounding(
    stage, extra, pool1, one_process, stage_inputs, policy, tmp_path
):
    verb, more = STAGES[stage]
    overrides = [*stage_overrides(stage_inputs, verb), *more, *extra, f"checkpoint.init_from={policy}"]
    actual = numbers(run_stage(pool1, verb, tmp_path, overrides), "train")
    for before, after in zip(numbers(one_process(stage), "train"), actual, strict=True):
        assert after == pytest.approx(before, rel=2e-4, abs=2e-5)


def test_the_first_preference_losses_are_their_closed_forms(one_process, stage_inputs):
    """Policy = reference: u = 0, so each first loss is known (nemotron4: dpo ln 2, ipo 1 / (4 beta^2), ...)."""
    import json
    import math

    import numpy as np

    rows = [json.loads(line) for line in stage_inputs.rows("pairs_held_out").read_text().splitlines()]
    gaps = np.array([row["chosen_reward"] - row["rejected_reward"] for row in rows])
    target = 1 / (1 + np.exp(-gaps))
    entropy = -(target * np.log(target) + (1 - target) * np.log1p(-target))
    expected = {
        "dpo": math.log(2),
        "ipo": 1 / (4 * 0.1**2),
        "rpo_sq": float(np.mean(gaps**2)),
        "rpo_bwd_kl": float(np.mean(math.log(2) - entropy)),
        "rpo_fwd_kl": float(np.mean(-math.log(2) - (np.log(target) + np.log1p(-target)) / 2)),
    }
    for stage, value in expected.items():
        held_out = next(record for record in one_process(stage) if record["kind"] == "validation")
        assert held_out["validation/rows/preference_loss"] == pytest.approx(value, abs=1e-5), stage
    first = next(record for record in one_process("dpo") if record["kind"] == "train")
    assert first["preference_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_overlapped_parameter_gathering_saves_the_last_update(pool2, stage_inputs, policy, tmp_path):
    """The gather of the last update is left to the next forward pass, and after the last step there is none."""
    overrides = [*stage_overrides(stage_inputs, "sft"), f"checkpoint.init_from={policy}", "~data.validation"]
    layouts = {"plain": {"data": 2}, "overlap": {"data": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}}
    saved = {}
    for name, layout in layouts.items():
        run_stage(pool2, "sft", tmp_path / name, overrides, layout)
        saved[name] = weights_of(tmp_path / name / "checkpoints" / "step_0000003")
    assert_equal(saved["overlap"], saved["plain"])
