"""What is said of a stage that nobody watched. That SLURM says what stands here is for tests/slurm to show."""

import os

import pytest

from nemo_align.pipeline.manifest import Manifest, StageRecord
from nemo_align.pipeline.stage_ends import refresh_records
from nemo_align.runtime import exit_codes, starts
from nemo_align.training.result import StageResult, write_result

JOB = "JobId=7 JobState={} Reason={} ExitCode={} NodeList=dgx[1-2]"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Let scontrol and sacct answer with these texts; None: they know no such job."""

    def answer(scontrol: str | None, sacct: str | None = None) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, text in {"scontrol": scontrol, "sacct": sacct}.items():
            (folder / name).write_text("#!/bin/bash\n" + ("exit 1\n" if text is None else f"echo '{text}'\n"))
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return answer


def refreshed(tmp_path) -> StageRecord:
    record = StageRecord(name="dpo", verb="preference", run_dir=str(tmp_path / "dpo"), job_id="7")
    refresh_records(Manifest(recipe="r", stages=[record]), ["dpo"])
    return record


def begun(tmp_path, code: int | None = None, reason: str = "") -> None:
    starts.began(tmp_path / "dpo", 16, {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "dgx[1-2]"})
    if code is not None:
        starts.ended(tmp_path / "dpo", code, reason)


@pytest.mark.parametrize(
    ("state", "expected"),
    [("PENDING", "pending"), ("RUNNING", "running"), ("SIGNALING", "running"), ("COMPLETING", "running")],
)
def test_a_job_that_has_not_ended(slurm, tmp_path, state, expected):
    slurm(JOB.format(state, "None", "0:0"))
    begun(tmp_path, exit_codes.STOPPED_AFTER_SAVING, "stopped by SIGTERM")  # of the start before
    record = refreshed(tmp_path)
    assert (record.status, record.reason, record.nodes) == (expected, None, "dgx[1-2]")


def test_the_run_knows_better_than_slurm_why_it_failed(slurm, tmp_path):
    slurm(JOB.format("FAILED", "NonZeroExitCode", "137:0"))
    begun(tmp_path, exit_codes.HUNG, "rank 0 made no progress; no answer from rank 3 (host dgx2, pid 9)")
    record = refreshed(tmp_path)
    assert (record.status, record.exit_code) == ("failed", exit_codes.HUNG)
    assert record.reason == "rank 0 made no progress; no answer from rank 3 (host dgx2, pid 9)"


@pytest.mark.parametrize(("state", "code"), [("TIMEOUT", 0), ("NODE_FAIL", 0), ("OUT_OF_MEMORY", 137)])
def test_where_nobody_lived_to_say_why_slurm_does(slurm, tmp_path, state, code):
    slurm(JOB.format(state, "None", f"0:{code - 128}" if code > 128 else "0:0"))
    begun(tmp_path)
    record = refreshed(tmp_path)
    assert (record.status, record.exit_code) == ("failed", code)
    assert record.reason == f"SLURM says {state}; see {tmp_path}/dpo/slurm-7.txt"


def test_a_cancelled_job_and_one_whose_parent_failed(slurm, tmp_path):
    slurm(JOB.format("CANCELLED", "DependencyNeverSatisfied", "0:0"))
    assert refreshed(tmp_path).reason == "a stage that it reads did not end well"
    begun(tmp_path, exit_codes.STOPPED_AFTER_SAVING, "stopped by SIGTERM")
    record = refreshed(tmp_path)
    assert (record.status, record.reason) == ("cancelled", "cancelled in SLURM")


def test_accounting_is_asked_when_the_controller_has_forgotten(slurm, tmp_path):
    slurm(None, "CANCELLED by 1000|0:0")
    record = refreshed(tmp_path)
    assert (record.status, record.reason) == ("cancelled", "cancelled in SLURM")


def test_without_accounting_what_the_run_wrote_must_do(slurm, tmp_path):
    slurm(None)
    assert refreshed(tmp_path).status == "cancelled"  # never started
    begun(tmp_path, exit_codes.STOPPED_AFTER_SAVING, "stopped by SIGUSR1")
    record = refreshed(tmp_path)
    assert (record.status, record.reason) == ("stopped", "stopped by SIGUSR1")
    begun(tmp_path)
    record = refreshed(tmp_path)
    assert (record.status, record.restarts) == ("failed", 1)
    assert record.reason == f"SLURM says gone; see {tmp_path}/dpo/slurm-7.txt"


def test_a_result_ends_all_doubt(slurm, tmp_path):
    slurm(JOB.format("CANCELLED", "None", "0:0"))
    begun(tmp_path, exit_codes.SUCCESS, "complete")
    write_result(tmp_path / "dpo", StageResult(verb="preference", experiment="x", output="checkpoints/step_0000003"))
    record = refreshed(tmp_path)
    assert (record.status, record.reason, record.nodes) == ("complete", None, "dgx[1-2]")
