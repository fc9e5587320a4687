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
        self.planned_kills: Counter[str] = Counter()  # case: what the tests that ran set out to do
        self.planned_stops: Counter[tuple[str, str, str]] = Counter()  # case, phase, signal
        self.kills: Counter[tuple[str, str, str]] = Counter()  # case, phase, victim
        self.mended: Counter[str] = Counter()  # victim: kills that the launcher itself mended
        self.stops: Counter[tuple[str, str, str]] = Counter()  # case, phase, signal
        self.late: Counter[str] = Counter()  # phase: over before the command was struck, which was then tried again
        self.faults: Counter[str] = Counter()  # other disturbances survived, by kind
        self.most_lost = 0
        self.most_lost_after_stop = 0
        self.checkpoints_checked = 0
        self.refused = 0  # damaged checkpoints that a run did not use
        self.equal_ends = 0
        self.longest_hang = 0.0  # seconds from the freezing of a rank to the restart
        self.ends_checked = 0  # ends of a command after which processes were looked for
        self.ports_checked = 0  # of these, such of which ports were known
        self.longest_vanishing = 0.0  # seconds from a command's end to that of its processes and ports
        self.mounts: Counter[str] = Counter()  # disks of the tests' own, mounted or not permitted

    def figures(self) -> dict:
        """All of it as JSON values."""
        return {
            "kills": self.kills.total(),
            "kills_planned": self.planned_kills.total(),
            "kills_by_victim": _summed(self.kills, 2),
            "kills_by_phase": _summed(self.kills, 1),
            "kills_by_case": _summed(self.kills, 0),
            "kills_mended_by_the_launcher": self.mended.total(),
            "stop_signals": self.stops.total(),
            "stop_signals_by_signal": _summed(self.stops, 2),
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
            "ends_without_a_process_left": self.ends_checked,
            "ends_without_a_port_left": self.ports_checked,
            "most_seconds_until_all_was_gone": round(self.longest_vanishing, 1),
            "disks": dict(self.mounts),
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

    def shortfalls(self) -> list[str]:
        """What the tests that ran set out to do and did not: none of it is a pass."""
        kills = _summed(self.kills, 0)
        found = [
            f"{case}: {kills.get(case, 0)} of {planned} kills"
            for case, planned in self.planned_kills.items()
            if kills.get(case, 0) < planned
        ]
        found += [f"{signal} in {case} at {phase}" for case, phase, signal in self.planned_stops - self.stops]
        if self.ends_checked and not self.ports_checked:
            found.append("no port was ever looked for")
        return found

    def write(self) -> None:
        """Write the JSON file if the environment names one."""
        if path := os.environ.get(REPORT_VARIABLE):
            Path(path).write_text(json.dumps(self.figures(), indent=2) + "\n")

    @property
    def used(self) -> bool:
        return bool(self.kills or self.stops or self.faults)


LEDGER = Ledger()  # of this session


def number_of_kills() -> int:
    """Kills to make in all by test_kills.py."""
    return int(os.environ.get(KILLS_VARIABLE, DEFAULT_KILLS))


def seed() -> int:
    """Of every choice of moment and victim."""
    return int(os.environ.get(SEED_VARIABLE, DEFAULT_SEED))


def _summed(counts: Counter, part: int) -> dict[str, int]:
    summed: Counter[str] = Counter()
    for key, count in counts.items():
        summed[key[part]] += count
    return dict(summed)
