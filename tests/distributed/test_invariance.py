"""Every objective computes the same under every layout: losses, metrics, gradients and weights of three steps.

Each case runs a whole stage through its entry point on real gloo processes and compares it with tests/oracle, a plain
fp64 implementation that knows neither Megatron-core nor this package's model, objectives and training: every metric of
metrics.jsonl of three steps and of the held-out set before and after, every element of the gradient of step 1 (from
Adam's first moment, which a fully reshardable checkpoint holds whole), and every weight after step 3.

The cases are a pairwise design (invariance_design.py): objective, micro-batch (packed, packed wide, 1, 2, 4), batch
ramp, preference terms, DP 1/2/3, TP 1/2/4, SP, PP 1/2/4, VP 1/2, distributed optimizer, overlap, architecture (KV
groups fewer than TP, a vocabulary that no TP divides, heads that do not add up to the hidden size), accumulation,
recomputation, clipping, schedule. 42 of 1,572,480 combinations, every feasible pair of levels covered. The fast tier
runs those 9 that have every level once. Beside the design stand 5 cases of PP 4 x VP 2 with a model of eight layers.

The tolerances and their reasons stand in invariance_errors.py, and the terminal summary prints the largest errors:
metrics within 5e-6 of max(1, |value|), gradients within 1e-5 of the largest element of their tensor, weights within
1.5e-3 of the learning rate; IPO's metrics within 5e-5 and weights within 1e-2.
"""

from __future__ import annotations

import pytest

from tests.distributed.invariance_design import ALL_ARCHITECTURES, BLOCKS, DEEP_CASES, DESIGN, REPRESENTATIVES, name_of
from tests.distributed.invariance_errors import check_fp32, compare
from tests.distributed.invariance_runs import Models, oracle_of, overrides_of, parallel_of, verb_of, world_size
from tests.distributed.stage_runs import run_stage
from tests.oracle.pairwise import Case, feasible_pairs, number_of_cases, pairs_of

FAST = [pytest.param(case, id=name_of(case)) for case in REPRESENTATIVES]
REST = [
    pytest.param(case, id=name_of(case), marks=pytest.mark.full)
    for case in (*DESIGN, *DEEP_CASES)
    if case not in REPRESENTATIVES
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("case", [*FAST, *REST])
def test_a_run_equals_the_oracle(case: Case, request, pools, models, stage_inputs, tmp_path):
    overrides = overrides_of(case, stage_inputs, models)
    records = run_stage(pools(world_size(case)), verb_of(case), tmp_path, overrides, parallel_of(case))
    errors = compare(case, tmp_path, records, oracle_of(case, stage_inputs, models))
    check_fp32(case, errors, how="fp32 against fp64", name=request.node.callspec.id)


def test_the_design_covers_every_feasible_pair():
    pairs = feasible_pairs(BLOCKS)
    assert len(pairs) > 1000
    covered = set().union(*map(pairs_of, DESIGN))
    assert covered == pairs, "a pair is missing, or a case is not feasible"
    for case in DESIGN:
        for block in BLOCKS:
            assert {key: case[key] for key in block[0]} in block, case
    assert {level for case in REPRESENTATIVES for level in case.items()} == {
        level for block in BLOCKS for combination in block for level in combination.items()
    }
    assert len(DESIGN) < 50 and f"{len(DESIGN)} of {number_of_cases(BLOCKS):,} combinations" in __doc__
    assert f"those {len(REPRESENTATIVES)} that have every level once" in __doc__.replace("\n", " ")


def test_the_cases_beside_the_design_have_every_family_of_objectives():
    assert {verb_of(case) for case in DEEP_CASES} == {"pretrain", "sft", "reward", "preference"}
    for case in DEEP_CASES:
        assert (case["pipeline"], case["virtual_pipeline"], world_size(case)) == (4, 2, 4)
        assert ALL_ARCHITECTURES[case["architecture"]].layers == 8
    assert f"{len(DEEP_CASES)} cases of PP 4 x VP 2" in __doc__
