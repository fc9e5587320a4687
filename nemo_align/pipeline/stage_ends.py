"""What became of a stage that no pipeline process watched: its result, what its run wrote down, what SLURM knows.

In this order, because SLURM forgets a job minutes after its end (MinJobAge) where no accounting is kept.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from nemo_align.pipeline.manifest import Manifest, StageRecord
from nemo_align.runtime import exit_codes, starts
from nemo_align.training.result import read_result

_PENDING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_RUNNING = ("RUNNING", "CONFIGURING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED")
# CANCELLED is an end of its own; every other state is one that SLURM counts as a failure: TIMEOUT, NODE_FAIL ...


@dataclass(frozen=True)
class JobState:
    """A job as SLURM's controller or its accounting has it."""

    state: str  # RUNNING, FAILED ...
    reason: str | None = None  # why it waits or ended: DependencyNeverSatisfied ...
    code: int | None = None  # of the batch script


def refresh_records(manifest: Manifest, names: Iterable[str]) -> None:
    """Bring these stages up to date."""
    for name in names:
        record = manifest[name]
        result = read_result(record.run_dir)
        record_end(record)
        if result is not None and result.status == "complete":
            record.finish(result)
        elif record.job_id is not None:
            _take_over_job(record)


def record_end(record: StageRecord) -> None:
    """Nodes and restarts of the stage, and why its last start ended, as its run wrote them down."""
    begun = starts.read(record.run_dir)
    if not begun:
        return
    last = begun[-1]
    record.nodes = last.nodes
    if record.job_id is not None:  # a local pipeline counts its own
        record.restarts = len(begun) - 1
    if record.status != "complete":
        record.reason = last.reason


def _take_over_job(record: StageRecord) -> None:
    """Status, exit code and reason of a stage without a result, whose job SLURM has or had."""
    assert record.job_id is not None
    job = _ask_controller(record.job_id) or _ask_accounting(record.job_id)
    own = [start for start in starts.read(record.run_dir) if start.job_id == record.job_id]
    end = own[-1] if own and own[-1].end_time is not None else None
    if job is not None and job.state in _PENDING + _RUNNING:
        record.status = "pending" if job.state in _PENDING else "running"
        record.exit_code, record.reason = None, None
        return
    record.exit_code = end.code if end else job.code if job else None
    if job is not None and job.state == "CANCELLED":
        record.status = "cancelled"
        dependency = "Dependency" in (job.reason or "")
        record.reason = "a stage that it reads did not end well" if dependency and not own else "cancelled in SLURM"
    elif end is not None and end.code == exit_codes.STOPPED_AFTER_SAVING:
        record.status, record.reason = "stopped", end.reason
    elif end is not None:
        record.status, record.reason = "failed", end.reason
    elif job is None and not own:
        record.status, record.reason = "cancelled", "its job never started, and SLURM has forgotten it"
    else:
        record.status = "failed"
        said = f"{job.state}, {job.reason}" if job and job.reason else job.state if job else "gone"
        record.reason = f"SLURM says {said}; see {record.run_dir}/slurm-{record.job_id}.txt"


def _ask_controller(job_id: str) -> JobState | None:
    text = _answer("scontrol", "--oneliner", "show", "job", job_id)
    fields = dict(field.split("=", 1) for field in (text or "").split() if "=" in field)
    if "JobState" not in fields:
        return None
    return JobState(
        state=fields["JobState"],
        reason=None if fields.get("Reason") in (None, "None") else fields["Reason"],
        code=_code(fields.get("ExitCode")),
    )


def _ask_accounting(job_id: str) -> JobState | None:
    text = _answer("sacct", "--noheader", "--allocations", "--parsable2", "--format=State,ExitCode", f"--jobs={job_id}")
    if not text or "|" not in text:
        return None
    state, code = text.splitlines()[-1].split("|")[:2]
    return JobState(state=state.split()[0], code=_code(code))  # "CANCELLED by 1000"


def _answer(*argv: str) -> str | None:
    """stdout of a command of SLURM; None if it fails, or is not installed here."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def _code(text: str | None) -> int | None:
    """Exit code of `2:0`; 128 + signal of `0:9`."""
    code, _, number = (text or "").partition(":")
    if not code.isdecimal():
        return None
    return 128 + int(number) if number.isdecimal() and int(number) else int(code)
