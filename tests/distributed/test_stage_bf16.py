"""Stages in bf16 on real gloo processes: near fp32, learning, and resumed to the last bit.

bf16 keeps 8 bits of a number: 0.4 % of each weight and activation. A loss averages over many of them.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.distributed.stage_runs import numbers, run_stage
from tests.stage_inputs import stage_overrides

LAYOUTS = {"one process": {}, "tp2_sp": {"tensor": 2, "sequence": True}}
STAGES = {"sft": "loss", "reward": "mse", "preference": "preference_loss"}  # verb -> held-out metric that it lowers
BF16 = "precision.dtype=bf16"


def overrides_of(verb, stage_inputs, policy, *extra: str) -> list[str]:
    return [*stage_overrides(stage_inputs, verb), f"checkpoint.init_from={policy}", *extra]


@pytest.fixture(scope="module")
def fp32(pool1, stage_inputs, policy, tmp_path_factory):
    """Records of a verb in fp32 under one process, run when first asked for."""
    runs: dict[str, list[dict]] = {}

    def records(verb: str) -> list[dict]:
        if verb not in runs:
            overrides = overrides_of(verb, stage_inputs, policy)
            runs[verb] = run_stage(pool1, verb, tmp_path_factory.mktemp(verb), overrides)
        return runs[verb]

    return records


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("verb", STAGES)
def test_bf16_is_near_fp32_and_learns(verb, layout, pool1, pool2, fp32, stage_inputs, policy, tmp_path):
    parallel = LAYOUTS[layout]
    overrides = overrides_of(verb, stage_inputs, policy, BF16)
    records = run_stage(pool2 if parallel else pool1, verb, tmp_path, overrides, parallel)
    train, exact = numbers(records, "train"), numbers(fp32(verb), "train")
    assert len(train) == 3
    if verb == "preference":
        assert train[0]["loss"] == pytest.approx(math.log(2), abs=2e-2)
    for actual, expected in zip(train, exact, strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-2, abs=1e-2 if verb == "preference" else 0)
        assert actual["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
    assert [record["num_tokens"] for record in train] == [record["num_tokens"] for record in exact]
    first, last = (record[f"validation/rows/{STAGES[verb]}"] for record in numbers(records, "validation"))
    before, after = (record[f"validation/rows/{STAGES[verb]}"] for record in numbers(fp32(verb), "validation"))
    assert (first, last) == pytest.approx((before, after), rel=1e-2, abs=2e-2 if verb == "preference" else 0)
    assert last < first + 2e-3 * abs(first)
    if verb == "sft":
        assert last < first


@pytest.mark.parametrize(
    "verb, layout", [("sft", "one process"), ("reward", "tp2_sp")]
)  # reward: buffers of two number formats
def test_a_resumed_run_is_exact(verb, layout, pool1, pool2, stage_inputs, policy, tmp_path):
    """Four steps at once and two and two: the same records, weights, fp32 copies and moments."""
    from nemo_align.checkpoint.storage import TensorReader

    parallel = LAYOUTS[layout]
    pool = pool2 if parallel else pool1
    overrides = overrides_of(verb, stage_inputs, policy, BF16, "train.epochs=2", "optimizer.schedule=cosine")
    ends = {}
    for name, stops in (("whole", (4,)), ("halves", (2, 4))):
        for stop in stops:
            records = run_stage(pool, verb, tmp_path / name, [*overrides, f"train.max_steps={stop}"], parallel)
        ends[name] = records, TensorReader(tmp_path / name / "checkpoints" / "step_0000004")
    (records, whole), (again, halves) = ends["whole"], ends["halves"]
    assert numbers(again, "train") == numbers(records, "train")
    assert numbers(again, "validation")[-1] == numbers(records, "validation")[-1]
    assert halves.names() == whole.names()
    formats = {whole.dtype(name) for name in whole.names() if name.startswith(("decoder", "embedding"))}
    assert formats == {torch.bfloat16}
    assert [name for name in whole.names() if not torch.equal(whole.read(name), halves.read(name))] == []
