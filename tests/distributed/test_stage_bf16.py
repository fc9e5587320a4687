"""Stages in bf16 on real gloo processes: near the fp64 oracle, and resumed to the last bit.

The oracle starts from the same weights rounded to bf16 (a reward head stays in fp32) and computes in fp64; fp32 runs
are that oracle to 1e-5 (test_invariance.py), so this is the distance of bf16 from fp32.

bf16 keeps 8 bits of a number: 0.4 % of each weight and activation. The bounds follow from that, and are two to three
times the largest errors measured (the terminal summary prints those):
- metrics 3e-2 of max(1, |value|): means over tokens or labels in which roundings partly cancel.
- gradient of step 1, as a whole, 3e-2 of its L2 norm, and each element 0.15 of the largest of its tensor.
- what three steps changed, as a whole, 6e-2 of its L2 norm. Single weights may differ by steps of the learning rate:
  where a gradient is near zero its rounding decides Adam's step.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed import invariance_report
from tests.distributed.invariance_design import REPRESENTATIVES, name_of
from tests.distributed.invariance_errors import compare
from tests.distributed.invariance_runs import Models, oracle_of, overrides_of, parallel_of, verb_of, world_size
from tests.distributed.stage_runs import numbers, run_stage
from tests.oracle.pairwise import Case
from tests.stage_inputs import stage_overrides

BF16 = "precision.dtype=bf16"
METRICS, GRADIENT, ELEMENT, UPDATE = 3e-2, 3e-2, 0.15, 6e-2
FAST = ("sft", "regression", "dpo")
CASES = [
    pytest.param(case, id=name_of(case), marks=() if case["objective"] in FAST else pytest.mark.full)
    for case in REPRESENTATIVES
]
LAYOUTS = {"one process": {}, "tp2_sp": {"tensor": 2, "sequence": True}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("case", CASES)
def test_bf16_is_near_the_oracle(case: Case, request, pools, models, stage_inputs, tmp_path):
    overrides = [*overrides_of(case, stage_inputs, models), BF16]
    records = run_stage(pools(world_size(case)), verb_of(case), tmp_path, overrides, parallel_of(case))
    expected = oracle_of(case, stage_inputs, models, bf16=True)
    errors = compare(case, tmp_path, records, expected, bf16=True)
    metric, name = errors.metric
    found = {"metric": metric, "gradient": errors.direction, "element": errors.gradient, "update": errors.update}
    invariance_report.record("bf16 against fp64", request.node.callspec.id, found)
    assert metric <= METRICS, (name, errors.metrics)
    assert errors.direction <= GRADIENT
    assert errors.gradient <= ELEMENT
    assert errors.update <= UPDATE


@pytest.mark.parametrize(
    "verb, layout", [("sft", "one process"), pytest.param("reward", "tp2_sp", marks=pytest.mark.full)]
)  # reward: buffers of two number formats
def test_a_resumed_run_is_exact(verb, layout, pool1, pool2, stage_inputs, policy, tmp_path):
    """Four steps at once and two and two: the same records, weights, fp32 copies and moments."""
    from nemo_align.checkpoint.streaming.torch_dist import TensorReader

    parallel = LAYOUTS[layout]
    pool = pool2 if parallel else pool1
    extra = [BF16, "train.epochs=2", "optimizer.schedule=cosine"]
    overrides = [*stage_overrides(stage_inputs, verb), f"checkpoint.init_from={policy}", *extra]
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
