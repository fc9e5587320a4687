"""A run directory that cannot be written is refused at once; checkpoints that cannot be written end the run."""

from __future__ import annotations

import pytest

from nemo_align.runtime import exit_codes
from tests.faults import checks
from tests.faults.disks import disk, read_only

pytestmark = pytest.mark.full


@pytest.mark.parametrize("case", ["sft", "score", "pipeline"])
@pytest.mark.parametrize("begun", [False, True])
def test_it_is_refused_before_any_work(case, begun, disturbed, ledger, tmp_path):
    with disk(tmp_path / "disk", "size=16m") as small:
        job = disturbed(case, run_dir=small.path / "run")
        if begun:
            job.run_dir.mkdir()
        small.remount("ro")
        attempt = job.finish()
        assert attempt.process.returncode == exit_codes.USER_ERROR
        lines = attempt.said().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert str(job.run_dir) in lines[0] and "Read-only file system" in lines[0], lines
        checks.nothing_left(attempt)
    ledger.faults["read-only run directory"] += 1


@pytest.mark.parametrize("saves", ["beside the steps", "between the steps"])
def test_checkpoints_that_cannot_be_written_any_more(saves, undisturbed, disturbed, ledger):
    asynchronous = f"checkpoint.asynchronous={str(saves == 'beside the steps').lower()}"
    job = disturbed("sft")
    folder = job.run_dir / "checkpoints"
    attempt = job.start(asynchronous)
    assert attempt.wait_until(lambda one: any(folder.glob("step_*"))), attempt.said()
    with read_only(folder):
        code = attempt.wait()
        said = attempt.said()
        checks.nothing_left(attempt)
        assert code == exit_codes.USER_ERROR, said
        assert "Traceback" not in said and str(folder) in said and "Read-only file system" in said, said
        before = checks.standings(job.run_dir)
        assert before[""].saved >= 2
        # Started again while it is still so: the same message, and nothing is lost meanwhile.
        again = job.finish(asynchronous)
        assert again.process.returncode == exit_codes.USER_ERROR, again.said()
        assert "Read-only file system" in again.said() and "Traceback" not in again.said(), again.said()
        assert checks.standings(job.run_dir)[""].saved == before[""].saved
    last = job.finish(asynchronous)
    assert last.process.returncode == exit_codes.SUCCESS, last.said()
    checks.no_temporary_files(job)
    checks.equal(undisturbed("sft").outcomes, checks.outcomes(job.run_dir))
    ledger.faults["read-only checkpoints"] += 1
    ledger.equal_ends += 1
