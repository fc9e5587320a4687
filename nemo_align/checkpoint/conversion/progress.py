"""How far a conversion is: a bar on a terminal, a line every half minute in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from nemo_align.checkpoint.streaming.transfer import Progress

_LINE_SECONDS = 30.0
_WORTH_A_LINE_SECONDS = 2.0

logger = logging.getLogger("nemo_align")


def progress_of(what: str) -> Progress:
    """The kind that suits standard error."""
    return _Bar(what) if sys.stderr.isatty() else Lines(what)


class _Bar(Progress):
    def __init__(self, what: str) -> None:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = RichProgress(TextColumn("{task.description}"), *columns, transient=True)
        self._what = what

    def begin(self, total: int, done: int) -> None:
        self._bar.start()
        self._task = self._bar.add_task(self._what, total=total, completed=done)

    def advance(self, num_bytes: int) -> None:
        self._bar.advance(self._task, num_bytes)

    def end(self) -> None:
        self._bar.stop()


class Lines(Progress):
    """One line in the log from time to time."""

    def __init__(self, what: str, seconds: float = _LINE_SECONDS) -> None:
        self._what, self._every = what, seconds
        self._lock = threading.Lock()

    def begin(self, total: int, done: int) -> None:
        self._total, self._done, self._before = total, done, done
        self._began = self._last = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            if time.monotonic() - self._last < self._every:
                return
            self._last = time.monotonic()
            line = self._line()
        logger.info("%s", line)

    def end(self) -> None:
        if time.monotonic() - self._began > _WORTH_A_LINE_SECONDS:
            logger.info("%s", self._line())

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (self._done - self._before) / seconds
        left = (self._total - self._done) / rate if rate else float("inf")
        share = 100 * self._done / self._total if self._total else 100.0
        return (
            f"{self._what}: {share:.1f} %, {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, "
            f"{rate / 1e6:.0f} MB/s, {_clock(left)} left"
        )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
