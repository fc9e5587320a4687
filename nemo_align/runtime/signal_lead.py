"""How long before its time limit a job must be told to stop, so that it can still save.

    lead = longest time between two looks at the signal + 1.5 x the time of the saves + 30 s

Between two looks lies a step or a validation batch. The saves are one, or two where they are written beside the steps:
one that is in flight is finished first. A file system that others write to takes now a half more, now a half less; 30 s
are for the ranks to end and the batch script to queue the job again. SLURM sends the signal up to a minute early, never
late. The 340B's training state has 4.77 TB: 60 s at 80 GB/s, 180 s at 26 GB/s, and that is what the default of 600 s of
slurm/train.sbatch holds for, with steps of half a minute.

Without torch: a plan computes the lead before the job, the run checks it after its first save.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping

from nemo_align.runtime.logs import LOGGER_NAME

logger = logging.getLogger(LOGGER_NAME)

VARIABLE = "NEMO_ALIGN_SIGNAL_LEAD"  # slurm/train.sbatch says there what it asked SLURM for, in seconds
DEFAULT_SECONDS = 600  # slurm/train.sbatch asks for it, unless it is told another
_SAVE_FACTOR, _END_SECONDS = 1.5, 30.0


def needed_seconds(longest_gap: float, save_seconds: float, *, asynchronous: bool) -> int:
    """The lead for `sbatch --signal=TERM@<lead>` and cluster.signal_lead_seconds, from seconds measured or planned.

    `longest_gap`: of a step or a forward-only batch; `asynchronous`: checkpoint.asynchronous.
    """
    return math.ceil(longest_gap + _SAVE_FACTOR * save_seconds * (2 if asynchronous else 1) + _END_SECONDS)


def longest_save(lead: int, *, asynchronous: bool) -> float:
    """Seconds that a save may take under a lead, steps aside: `needed_seconds` turned round. 0: there is no time."""
    return max(0.0, lead - _END_SECONDS) / (_SAVE_FACTOR * (2 if asynchronous else 1))


def configured(variables: Mapping[str, str] = os.environ) -> int:
    """The lead of a job that starts with these variables."""
    text = variables.get(VARIABLE, "")
    return int(text) if text.isdecimal() else DEFAULT_SECONDS


class LeadCheck:
    """Says once that a job's lead is too short for the saves that it makes."""

    def __init__(self, *, asynchronous: bool, variables: Mapping[str, str] = os.environ) -> None:
        text = variables.get(VARIABLE, "") if "SLURM_JOB_ID" in variables else ""
        self._lead = int(text) if text.isdecimal() else None
        self._asynchronous = asynchronous
        self._longest_gap = 0.0
        self._looked: float | None = None

    def look(self) -> None:
        """The run looks whether it was told to stop."""
        now = time.monotonic()
        if self._looked is not None:
            self._longest_gap = max(self._longest_gap, now - self._looked)
        self._looked = now

    def pause(self) -> None:
        """What follows is no step: a save that is waited for."""
        self._looked = None

    def saved(self, seconds: float) -> None:
        """A save took so long from its begin to its publication."""
        if self._lead is None:
            return
        needed = needed_seconds(self._longest_gap, seconds, asynchronous=self._asynchronous)
        if needed > self._lead:
            logger.warning(
                "a save took %.0f s and the longest step %.0f s: the signal must come %d s before the time limit, not "
                "%d (cluster.signal_lead_seconds=%d; or sbatch --signal=TERM@%d and %s=%d). A job whose last "
                "save is cut off goes on from the one before",
                seconds,
                self._longest_gap,
                needed,
                self._lead,
                needed,
                needed,
                VARIABLE,
                needed,
            )
            self._lead = None
