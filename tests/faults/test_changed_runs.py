"""What people do to a run between two starts, and two commands in one run directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_align.runtime import exit_codes
from tests.faults import checks
from tests.faults.runs import Attempt, Job

pytestmark = pytest.mark.full


def stopped_in_the_middle(job: Job, *extra: str) -> None:
    """Start the command and kill it once a checkpoint is there."""
    attempt = job.start(*extra)
    assert attempt.wait_until(lambda one: any(job.run_dir.glob("checkpoints/step_*"))), attempt.said()
    attempt.strike("command")
    attempt.wait()
    checks.nothing_left(attempt)


def refused(attempt: Attempt, *texts: str) -> None:
    said = attempt.said()
    assert attempt.process.returncode == exit_codes.USER_ERROR, said
    assert "Traceback" not in said and "error: " in said, said
    missing = [text for text in texts if text not in said]
    assert not missing, f"{missing} not in\n{said}"
    checks.nothing_left(attempt)


def ends_equal(job: Job, expected: dict[str, checks.Outcome], ledger, *extra: str) -> None:
    attempt = job.finish(*extra)
    assert attempt.process.returncode == exit_codes.SUCCESS, attempt.said()
    checks.nothing_left(attempt)
    checks.no_temporary_files(job)
    checks.equal(expected, checks.outcomes(job.run_dir))
    ledger.equal_ends += 1


def test_changed_data_are_refused_until_they_are_back(inputs, undisturbed, disturbed, ledger, tmp_path):
    rows = tmp_path / "rows.jsonl"
    shutil.copy(inputs.stage.rows("dialogues"), rows)
    job = disturbed("sft", extra=[f"data.train.rows.path={rows}"])
    stopped_in_the_middle(job)
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([lines[1], lines[0], *lines[2:]]))  # two rows have changed places
    refused(job.finish(), "the training data changed since the checkpoint", "Restore the data", "step_0000", str(rows))
    rows.write_text("".join(lines))
    ends_equal(job, undisturbed("sft").outcomes, ledger)
    ledger.faults["changed data"] += 1


def test_a_changed_configuration_is_refused_with_its_keys(undisturbed, disturbed, ledger):
    job = disturbed("sft")
    stopped_in_the_middle(job)
    refused(job.finish("optimizer.lr=2e-3"), "optimizer.lr: 0.001 -> 0.002", str(job.run_dir))
    ends_equal(job, undisturbed("sft").outcomes, ledger)
    ledger.faults["changed configuration"] += 1


def test_other_initial_weights_are_refused(undisturbed, disturbed, ledger, tmp_path):
    """The run that `checkpoint.init_from` names went on meanwhile: its newest checkpoint is another one."""
    source = tmp_path / "source"
    shutil.copytree(undisturbed("sft").job.run_dir, source)
    job = disturbed("preference", extra=[f"checkpoint.init_from={source}"])
    stopped_in_the_middle(job)
    newest = checks.newest(source)
    shutil.move(newest, tmp_path / "aside")
    refused(job.finish(), "is no longer what the run in", "name the checkpoint it was")
    shutil.move(tmp_path / "aside", newest)
    ends_equal(job, undisturbed("preference").outcomes, ledger)
    ledger.faults["other initial weights"] += 1


def test_deleted_checkpoints_begin_the_run_anew(undisturbed, disturbed, ledger):
    job = disturbed("sft")
    stopped_in_the_middle(job)
    shutil.rmtree(job.run_dir / "checkpoints")
    ends_equal(job, undisturbed("sft").outcomes, ledger)
    assert job.attempts[-1].steps()[0] == 1
    ledger.faults["deleted checkpoints"] += 1


def test_a_second_command_is_refused_while_the_first_runs(undisturbed, disturbed, ledger):
    job = disturbed("sft")
    first = job.start()
    assert first.wait_until(lambda one: bool(one.lines())), first.said()
    second = Job(job.arguments[:-1], _beside(job), job.run_dir).finish()
    refused(second, f"another command (process {first.process.pid} on ", str(job.run_dir))
    assert first.wait() == exit_codes.SUCCESS, first.said()
    checks.equal(undisturbed("sft").outcomes, checks.outcomes(job.run_dir))
    ledger.faults["two commands at once"] += 1
    ledger.equal_ends += 1


def test_of_commands_started_together_one_runs(undisturbed, disturbed, ledger):
    job = disturbed("sft")
    attempts = [job.start(), *(Job(job.arguments[:-1], _beside(job), job.run_dir).start() for _ in range(2))]
    codes = sorted(attempt.wait() for attempt in attempts)
    assert codes == [exit_codes.SUCCESS, exit_codes.USER_ERROR, exit_codes.USER_ERROR], [a.said() for a in attempts]
    checks.equal(undisturbed("sft").outcomes, checks.outcomes(job.run_dir))
    ledger.faults["two commands at once"] += 1
    ledger.equal_ends += 1


def _beside(job: Job) -> Path:
    folder = job.folder / f"beside_{len(list(job.folder.glob('beside_*')))}"
    folder.mkdir()
    return folder
