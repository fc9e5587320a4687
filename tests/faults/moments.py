"""The phases of a run, as moments that an attempt can be watched for, with seeded chance in each."""

from __future__ import annotations

import random
from pathlib import Path

from tests.faults.cases import VALIDATE_EVERY
from tests.faults.runs import Attempt, Moment

# In the order in which a run comes to them.
TRAINING = (
    "start-up",
    "loading",
    "random time",
    "step",
    "validation",
    "save begun",
    "save written",
    "save described",
    "last save",
    "export",
)
PREFERENCE = (*TRAINING[:2], "reference pass", *TRAINING[2:])
SCORING = ("start-up", "loading", "random time", "scoring", "results")
PIPELINE = ("start-up", "sft: step", "reward: save", "scoring", "dpo: reference pass", "dpo: step", "random time")


def moment(name: str, chance: random.Random, *, start_up: float, duration: float, final_step: int) -> Moment:
    """The moment of that name.

    Args:
        start_up: seconds from the start to the first line of the log, as known from the undisturbed run.
        duration: seconds of the undisturbed run.
        final_step: last step of the run.
    """
    soon, steps = chance.uniform(0, 0.06), chance.randint(1, 3)
    if name == "start-up":
        return _after(name, chance.uniform(0.0, start_up))
    if name == "random time":
        return _after(name, chance.uniform(0.0, 0.9 * duration))
    if name == "loading":
        return Moment(name, lambda attempt: bool(attempt.lines()), chance.uniform(0, 0.5))
    if name == "step":
        return Moment(name, lambda attempt: len(attempt.steps()) >= steps, soon)
    if name == "validation":
        return Moment(name, _in_validation, chance.uniform(0, 0.03))
    if name == "save begun":
        return Moment(name, lambda attempt: bool(_pending(attempt)), chance.uniform(0, 0.03))
    if name == "save written":
        return Moment(name, lambda attempt: any(path.suffix == ".distcp" for path in _pending_files(attempt)))
    if name == "save described":
        return Moment(name, lambda attempt: any(path.name == ".metadata" for path in _pending_files(attempt)))
    if name == "last save":
        return Moment(name, lambda attempt: attempt.steps()[-1:] == [final_step], chance.uniform(0, 0.5))
    if name == "export":
        result = "result.json"
        return Moment(name, lambda attempt: (attempt.job.run_dir / result).exists(), chance.uniform(0, 0.6))
    if name in ("reference pass", "scoring"):
        word = f"nemo_align: {name.split()[0].removesuffix('ing').replace('scor', 'score')} "
        count = chance.randint(1, 2)
        return Moment(name, lambda attempt: sum(word in line for line in attempt.lines()) >= count, soon)
    if name == "results":
        return Moment(name, lambda attempt: any(" rows scored -> " in line for line in attempt.lines()), soon)
    stage, _, phase = name.partition(": ")
    inner = moment(
        {"save": "save written"}.get(phase, phase), chance, start_up=start_up, duration=duration, final_step=final_step
    )
    return Moment(name, lambda attempt: (attempt.job.run_dir / stage / "log.txt").exists() and inner.reached(attempt))


def _after(name: str, seconds: float) -> Moment:
    return Moment(name, lambda attempt: attempt.seconds >= seconds)


def _in_validation(attempt: Attempt) -> bool:
    steps = attempt.steps()
    return bool(steps) and steps[-1] % VALIDATE_EVERY == 0 and "held out" not in attempt.lines()[-1]


def _pending(attempt: Attempt) -> list[Path]:
    run_dir = attempt.job.run_dir
    return [path for pattern in ("checkpoints", "*/checkpoints") for path in run_dir.glob(f"{pattern}/.tmp-step_*")]


def _pending_files(attempt: Attempt) -> list[Path]:
    found = []
    for folder in _pending(attempt):
        try:
            found += list(folder.iterdir())
        except FileNotFoundError:  # published meanwhile
            continue
    return found
