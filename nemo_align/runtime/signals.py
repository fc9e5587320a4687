"""Stopping between two steps when SIGTERM or SIGUSR1 asks for it.

Imports no torch at the top: the handlers must be there before the seconds that importing it takes.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_align.runtime.topology import Topology

from nemo_align.runtime.exit_codes import STOPPED_AFTER_SAVING
from nemo_align.runtime.logs import LOGGER_NAME

logger = logging.getLogger(LOGGER_NAME)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_asked: Callable[[], bool] | None = None


class StopRequest:
    """Whether this process was asked to stop.

    The handler only notes the signal. Whoever runs a long loop (training steps, validation or scoring batches) asks
    `agreed` once per round, so that all ranks leave at the same one. Signals repeat (SLURM sends SIGTERM at the time
    limit too), and a repetition changes nothing: it must not cut the save that the first one began.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None

    def install(self) -> None:
        """Handle SIGTERM and SIGUSR1 from now on, and one that our launcher kept waiting. Main thread only."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def close(self) -> None:
        """The process is about to end: a signal that comes now changes nothing.

        Python takes its handlers away while it ends, and the default action would make a finished worker look killed.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number)

    @property
    def requested(self) -> bool:
        """Whether a signal reached this very process. Ranks may differ: see `agreed`."""
        return self._signal is not None

    @property
    def reason(self) -> str:
        """Why the run stops, in words."""
        return f"stopped by {self._signal.name}" if self._signal is not None else "another rank was asked to stop"

    def agreed(self, topology: Topology) -> bool:
        """Whether any rank was asked. A collective over all ranks (one number); all get the same answer."""
        from nemo_align.runtime.agreement import highest

        return bool(highest(topology, [self.requested])[0])

    def leave_if_agreed(self, topology: Topology) -> None:
        """End the process where there is nothing to save yet, if any rank was asked to. A collective over all ranks."""
        if self.agreed(topology):
            if topology.is_main:
                logger.info("stopped by a signal before the first step")
            raise SystemExit(STOPPED_AFTER_SAVING)


@contextmanager
def interruptible(asked: Callable[[], bool]) -> Iterator[None]:
    """Within the block `leave_if_asked` ends the process once `asked()`."""
    global _asked
    before, _asked = _asked, asked
    try:
        yield
    finally:
        _asked = before


def leave_if_asked() -> None:
    """For loops that one rank runs alone while the others wait (preparing data): end the process if a stop is wanted.

    Raises SystemExit(STOPPED_AFTER_SAVING), inside of `interruptible` only."""
    if _asked is not None and _asked():
        raise SystemExit(STOPPED_AFTER_SAVING)
