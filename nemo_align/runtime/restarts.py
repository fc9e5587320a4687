"""Whether workers that broke down are started again. They resume from the newest checkpoint."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

_CHECKPOINT = re.compile(r"step_(\d+)")
_TAIL_BYTES = 65536  # of metrics.jsonl: more than one record


@dataclass(frozen=True)
class Reached:
    """How far a run has come; -1: not even begun."""

    checkpoint: int  # step of the newest checkpoint
    step: int  # of the last record of metrics.jsonl

    @classmethod
    def by(cls, run_dir: Path) -> Reached:
        """What `run_dir` shows. Whether a checkpoint is whole is for the workers to say: they take the one before."""
        names = [path.name for path in (run_dir / "checkpoints").glob("step_*")]
        steps = [int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))]
        return cls(checkpoint=max(steps, default=-1), step=_last_step(run_dir / "metrics.jsonl"))

    def is_beyond(self, other: Reached) -> bool:
        return self.checkpoint > other.checkpoint or self.step > other.step

    def furthest(self, other: Reached) -> Reached:
        return Reached(max(self.checkpoint, other.checkpoint), max(self.step, other.step))


class Restarts:
    """Counts restarts since the run last made progress: a newer checkpoint, or metrics of a step not reached before."""

    def __init__(self, run_dir: str | Path | None, most: int) -> None:
        assert run_dir is not None or most == 0, "without a run directory nobody can resume"
        self._run_dir = Path(run_dir or ".")
        self._most = most
        self._count = 0
        self._furthest = Reached.by(self._run_dir) if most else Reached(-1, -1)

    def next(self, reason: str) -> str | None:
        """A line that announces the next restart; None if there were enough."""
        if self._most == 0:
            return None
        now = Reached.by(self._run_dir)
        if now.is_beyond(self._furthest):
            self._count = 0
        self._furthest = now.furthest(self._furthest)
        if self._count == self._most:
            return None
        self._count += 1
        whence = "starting from the beginning: no checkpoint yet"
        if now.checkpoint >= 0:
            whence = f"resuming from checkpoints/step_{now.checkpoint:07d}"
        return f"restart {self._count} of {self._most}: {reason}; {whence}"

    @property
    def exhausted(self) -> bool:
        """Whether restarts were wanted and did not help."""
        return 0 < self._most == self._count


def _last_step(metrics: Path) -> int:
    """Step of the last whole record; -1 if there is none."""
    try:
        with open(metrics, "rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - _TAIL_BYTES))
            lines = stream.read().split(b"\n")[:-1]  # behind the last line break: nothing, or a record half written
    except OSError:
        return -1
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return -1
