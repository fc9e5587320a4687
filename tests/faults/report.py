"""What the harness did, in figures: printed at the end of the run, and written as JSON when asked."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

REPORT_VARIABLE = "NEMO_ALIGN_FAULTS_REPORT"  # a file to write the figures to
KILLS_VARIABLE = "NEMO_ALIGN_FAULTS_KILLS"
SEED_VARIABLE = "NEMO_ALIGN_FAULTS_SEED"
DEFAULT_KILLS, DEFAULT_SEED = 32, 3


class Ledger:
    """Counts over all tests of a session."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.kills: Counter[tuple[str, str, str]] = Counter()  # case, phase, victim
        self.stops: Counter[tuple[str, str, str]] = Counter()  # case, phase, signal
        self.late: Counter[str] = Counter()  # phase: the command had ended before
        self.faults: Counter[str] = Counter()  # other disturbances survived, by kind
        self.most_lost = 0
        self.most_lost_after_stop = 0
        self.checkpoints_checked = 0
        self.refused = 0  # damaged checkpoints that a run did not use
        self.equal_ends = 0
        self.longest_hang = 0.0  # seconds from the freezing of a rank to the restart

    def figures(self) -> dict:
        """All of it as JSON values."""
        return {
            "kills": sum(self.kills.values()),
            "kills_by_victim": _summed(self.kills, 2),
            "kills_by_phase": _summed(self.kills, 1),
            "kills_by_case": _summed(self.kills, 0),
            "stop_signals": sum(self.stops.values()),
            "stop_signals_by_phase": _summed(self.stops, 1),
            "stop_signals_by_case": _summed(self.stops, 0),
            "too_late": dict(self.late),
            "other_faults": dict(self.faults),
            "most_steps_lost": self.most_lost,
            "most_steps_lost_after_a_stop_signal": self.most_lost_after_stop,
            "published_checkpoints_verified": self.checkpoints_checked,
            "damaged_checkpoints_refused": self.refused,
            "ends_equal_to_the_last_bit": self.equal_ends,
            "most_seconds_from_frozen_rank_to_restart": round(self.longest_hang, 1),
            "seed": seed(),
            "seconds": round(time.monotonic() - self.started),
        }

    def lines(self) -> list[str]:
        """The same for people."""
        figures = self.figures()
        texts = []
        for name, value in figures.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {count}" for key, count in sorted(value.items())) or "none"
            texts.append(f"{name.replace('_', ' ')}: {value}")
        return texts

    def write(self) -> None:
        """Write the JSON file if the environment names one."""
        if path := os.environ.get(REPORT_VARIABLE):
            Path(path).write_text(json.dumps(self.figures(), indent=2) + "\n")

    @property
    def used(self) -> bool:
        return bool(self.kills or self.stops or self.faults)


def number_of_kills() -> int:
    """Kills to make in all."""
    return int(os.environ.get(KILLS_VARIABLE, DEFAULT_KILLS))


def seed() -> int:
    """Of every choice of moment and victim."""
    return int(os.environ.get(SEED_VARIABLE, DEFAULT_SEED))


def _summed(counts: Counter, part: int) -> dict[str, int]:
    summed: Counter[str] = Counter()
    for key, count in counts.items():
        summed[key[part]] += count
    return dict(summed)
