"""What the kernel says of a process that does not answer (Linux's /proc)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_WORDS = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a device or a file system that does not answer",
    "T": "stopped",
    "t": "stopped by a debugger",
    "Z": "ended, but not yet gone",
    "X": "dead",
    "I": "idle",
}
STOPPED = ("T", "t")


def state_letter(pid: int) -> str | None:
    """State of the main thread as proc(5) writes it: R, S, D, T, ...; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()[0]  # the name, in brackets, may hold anything


def describe_state(pid: int) -> str:
    """`stopped (state T)`."""
    letter = state_letter(pid)
    return "gone" if letter is None else f"{_WORDS.get(letter, 'unknown')} (state {letter})"


class StoppedClock:
    """How long processes have been stopped (SIGSTOP, a debugger) without a break."""

    def __init__(self, most: float) -> None:
        """`most`: seconds that count at most between two looks, so that time in which we stood still does not."""
        self._most = most
        self._seconds: dict[int, float] = {}

    def look(self, pids: Iterable[int], elapsed: float) -> float:
        """Seconds that the longest stopped of `pids` has been so; `elapsed`: seconds since the last look."""
        self._seconds = {
            pid: self._seconds.get(pid, 0.0) + min(elapsed, self._most) for pid in pids if state_letter(pid) in STOPPED
        }
        return max(self._seconds.values(), default=0.0)
