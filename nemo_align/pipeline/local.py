"""Running stages on this machine, each in processes of its own, with signals handed on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

from nemo_align.pipeline.chain import Stage
from nemo_align.runtime.parent_death import die_with_parent

_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def command(stage: Stage) -> list[str]:
    """The command of a stage, by the interpreter that runs us."""
    return [sys.executable, "-m", "nemo_align.cli", stage.verb, *stage.arguments]


class LocalRunner:
    """Runs one stage at a time. Main thread only.

    A stop signal reaches the stage, which saves and ends; `stopped` tells that no further stage should start.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._process: subprocess.Popen | None = None

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """SIGTERM, SIGUSR1 and Ctrl-C go to the running stage."""
        before = {number: signal.signal(number, self._forward) for number in _FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, stage: Stage) -> int:
        """Exit code of the stage's command; 128 + signal number if a signal ended it."""
        self._process = subprocess.Popen(
            command(stage),
            stdin=subprocess.DEVNULL,
            # A group of its own, so that Ctrl-C reaches it once, through us; and it never outlives us, even if we are
            # killed: a second run in the same folder would otherwise write beside it.
            process_group=0,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
        try:
            code = self._process.wait()
        finally:
            self._process = None
        return code if code >= 0 else 128 - code

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
