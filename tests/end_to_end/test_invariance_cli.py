"""A dozen cases of the invariance design through the real command: `nemo-align <verb> ...` in processes of its own.

The same comparison with the fp64 oracle as in tests/distributed/test_invariance.py, with the same bounds.
"""

from __future__ import annotations

import pytest

from nemo_align.training.metrics import read_metrics
from tests.distributed.invariance_design import DESIGN, REPRESENTATIVES, name_of
from tests.distributed.invariance_errors import check_fp32, compare
from tests.distributed.invariance_runs import Models, oracle_of, overrides_of, parallel_of, verb_of, world_size
from tests.distributed.stage_runs import numbers, run_stage
from tests.end_to_end.commands import run
from tests.oracle.pairwise import Case

# Every level of every factor, and three with two workers, of which those have none.
CASES = [*REPRESENTATIVES, *[case for case in DESIGN if world_size(case) == 2][:3]]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def command_of(case: Case, stage_inputs, models: Models) -> list[str]:
    layout = [f"parallel.{key}={str(value).lower()}" for key, value in parallel_of(case).items()]
    return [verb_of(case), "precision=fp32", *overrides_of(case, stage_inputs, models), *layout, "run_dir=run"]


def finished(case: Case, stage_inputs, models: Models, folder) -> list[dict]:
    done = run(*command_of(case, stage_inputs, models), cwd=folder)
    assert done.returncode == 0, done.stderr
    return read_metrics(folder / "run")


@pytest.mark.full
@pytest.mark.parametrize("case", [pytest.param(case, id=name_of(case)) for case in CASES])
def test_the_command_equals_the_oracle(case: Case, request, models, stage_inputs, tmp_path):
    records = finished(case, stage_inputs, models, tmp_path)
    errors = compare(case, tmp_path / "run", records, oracle_of(case, stage_inputs, models))
    check_fp32(case, errors, how="fp32 against fp64, by the command", name=request.node.callspec.id)


def test_the_cases_have_every_verb_and_number_of_workers():
    assert len(CASES) == 12
    assert {verb_of(case) for case in CASES} == {"pretrain", "sft", "reward", "preference"}
    assert {world_size(case) for case in CASES} == {1, 2, 3, 4}


@pytest.mark.full
def test_the_command_equals_the_pool(pools, models, stage_inputs, tmp_path):
    """To the last bit: what the tests on pools of workers prove, they prove of the command."""
    case = next(case for case in DESIGN if case["objective"] == "dpo" and world_size(case) == 2)
    records = finished(case, stage_inputs, models, tmp_path)
    overrides = overrides_of(case, stage_inputs, models)
    pooled = run_stage(pools(2), verb_of(case), tmp_path / "pool", overrides, parallel_of(case))
    for kind in ("train", "validation"):
        assert numbers(records, kind) == numbers(pooled, kind)
