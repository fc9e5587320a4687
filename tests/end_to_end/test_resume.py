"""Killed and started again, a run ends as if nothing had happened: to the last bit on the same layout."""

import signal

import pytest

from nemo_align.runtime import starts
from nemo_align.training.metrics import read_metrics
from tests.distributed.stage_runs import numbers
from tests.end_to_end.commands import run, run_until_step
from tests.stage_inputs import MODEL, stage_overrides

CASES = {
    # Phases, two data-parallel ranks.
    "pretrain": ("pretrain", ["data.phases.second.steps=6", "parallel.data=2"]),
    # Across the border of an epoch (33 dialogues, batches of 10), packed, pipelined.
    "sft": ("sft", ["train.max_steps=8", "parallel.pipeline=2"]),
}


def outcome(run_dir) -> tuple[list[dict], list[dict]]:
    records = read_metrics(run_dir)
    return numbers(records, "train"), numbers(records, "validation")


# One in `make test`; the others in `make test-faults`.
@pytest.mark.parametrize(
    "case, how",
    [
        ("sft", signal.SIGKILL),
        pytest.param("pretrain", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("sft", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("pretrain", signal.SIGKILL, marks=pytest.mark.full),
    ],
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(case, how, stage_inputs, undisturbed, tmp_path):
    verb, extra = CASES[case]
    arguments = [verb, *MODEL, *stage_overrides(stage_inputs, verb), *extra, "checkpoint.save_every=2", "run_dir=run"]
    code = run_until_step(5, *arguments, cwd=tmp_path, run_dir=tmp_path / "run", kill_with=how)
    assert code == (75 if how == signal.SIGTERM else -signal.SIGKILL)
    resumed = run(*arguments, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed" in resumed.stderr
    assert outcome(tmp_path / "run") == undisturbed(case)
    first, second = starts.read(tmp_path / "run")
    assert first.code == (75 if how == signal.SIGTERM else None)  # killed, it cannot say why it ended
    assert (second.code, second.reason) == (0, "complete")


@pytest.fixture(scope="module")
def undisturbed(stage_inputs, tmp_path_factory):
    """Metrics of the same run without a signal, run when first asked for."""
    outcomes = {}

    def of(case: str):
        if case not in outcomes:
            verb, extra = CASES[case]
            folder = tmp_path_factory.mktemp(case)
            arguments = [verb, *MODEL, *stage_overrides(stage_inputs, verb), *extra, "run_dir=run"]
            finished = run(*arguments, "checkpoint.save_every=2", cwd=folder)
            assert finished.returncode == 0, finished.stderr
            outcomes[case] = outcome(folder / "run")
        return outcomes[case]

    return of


def test_a_finished_run_is_left_alone(stage_inputs, tmp_path):
    verb, extra = CASES["sft"]
    arguments = [verb, *MODEL, *stage_overrides(stage_inputs, verb), *extra, "run_dir=run"]
    assert run(*arguments, cwd=tmp_path).returncode == 0
    result = (tmp_path / "run" / "result.json").read_bytes()
    again = run(*arguments, cwd=tmp_path)
    assert again.returncode == 0
    assert "complete" in again.stderr
    assert (tmp_path / "run" / "result.json").read_bytes() == result
