"""Exit codes of workers and of the command that starts them."""

from __future__ import annotations

SUCCESS = 0
FAILURE = 1  # an error with a traceback in the log
USER_ERROR = 2  # a message that says what to change; also argparse's code
STOPPED_AFTER_SAVING = 75  # by a signal: the same command goes on where it stopped (EX_TEMPFAIL of sysexits.h)
HUNG = 76  # no progress for runtime.hang_timeout_minutes: the same command goes on from the newest checkpoint
INTERRUPTED = 130  # Ctrl-C: 128 + SIGINT, as shells count
