"""<run_dir>/starts.jsonl: when and where the run was started, and how each start ended.

What a job leaves for a pipeline, a summary and the next person to look: its node list, its count of restarts, and the
reason for which it ended. Lines are appended, one per start and one per end; an end that no process lived to write
(SIGKILL, a node that failed) is missing, which says as much. Imports no torch.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

STARTS_FILE = "starts.jsonl"
# A file that a batch script names, to learn what srun's code does not say: that is the highest of all tasks, most of
# which were ended because one had. Lines: "step <run_dir> <step resumed from>", "end <code>", the first end first.
NOTE_VARIABLE = "NEMO_ALIGN_PROGRESS_NOTE"
_MOST_CHARACTERS = 2000  # of a reason


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run. Times in ISO 8601, UTC."""

    time: str
    job_id: str | None  # of SLURM
    job_restarts: int  # how often SLURM had queued the job again before this start
    nodes: str  # SLURM's node list, or this host
    ranks: int
    end_time: str | None = None  # None: it runs, or nobody lived to write it
    code: int | None = None  # one of runtime/exit_codes.py
    reason: str | None = None  # for the end, in words


def began(run_dir: str | Path, ranks: int, variables: Mapping[str, str] = os.environ) -> None:
    """Append a start. Rank 0 only."""
    start = Start(
        time=_now(),
        job_id=variables.get("SLURM_JOB_ID"),
        job_restarts=int(variables.get("SLURM_RESTART_COUNT") or 0),
        nodes=variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST") or socket.gethostname(),
        ranks=ranks,
    )
    _append(run_dir, {key: value for key, value in asdict(start).items() if value is not None})


def resumed(run_dir: str | Path, step: int) -> None:
    """Tell the batch script which checkpoint this start goes on from. Rank 0 only."""
    _note(f"step {run_dir} {step}")


def ended(run_dir: str | Path, code: int, reason: str) -> None:
    """Append how the newest start ended. One rank only: the first that knows."""
    _note(f"end {code}")
    _append(run_dir, {"end_time": _now(), "code": code, "reason": reason[:_MOST_CHARACTERS]})


def read(run_dir: str | Path) -> list[Start]:
    """All starts in their order; of several ends of a start the first, which is the cause of the others."""
    try:
        lines = (Path(run_dir) / STARTS_FILE).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    starts: list[dict] = []
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:  # half a line, of a process that was killed or a disk that was full
            continue
        if "end_time" not in values:
            starts.append(values)
        elif starts and "end_time" not in starts[-1]:
            starts[-1] |= values
    return [Start(**{"job_id": None, **values}) for values in starts]


def _append(run_dir: str | Path, values: dict) -> None:
    path = Path(run_dir) / STARTS_FILE
    with suppress(OSError):  # a record for people: a disk that is full must not end the run, nor hide why it ended
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as stream:
            if stream.tell() > 0:
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # half a line of a process that was killed: it must not take this one along
                    stream.write(b"\n")
            stream.write(json.dumps(values).encode() + b"\n")


def _note(line: str) -> None:
    if path := os.environ.get(NOTE_VARIABLE):
        with suppress(OSError), open(path, "a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
