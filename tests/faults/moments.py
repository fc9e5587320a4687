"""The phases of a run, as moments that an attempt can be watched for, with seeded chance in each."""

from __future__ import annotations

import random
from pathlib import Path

from tests.faults.cases import VALIDATE_EVERY
from tests.faults.runs import STEP, Attempt, Moment

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
)
PRETRAINING = (*TRAINING, "export")
PREFERENCE = (*TRAINING[:2], "reference pass", *TRAINING[2:], "export")
SCORING = ("start-up", "loading", "random time", "scoring", "results")
PIPELINE = (
    "start-up",
    "sft: step",
    "reward: save written",
    "score: scoring",
    "dpo: reference pass",
    "dpo: save begun",
    "random time",
)


def moment(
    name: str, chance: random.Random, *, start_up: float, duration: float, final_step: int, stage: str = ""
) -> Moment:
    """The moment of that name.

    Args:
        start_up: seconds from the start to the first line of the log, as known from the undisturbed run.
        duration: seconds of the undisturbed run.
        final_step: last step of the run.
        stage: of a pipeline, to look at alone.
    """
    soon, steps = chance.uniform(0, 0.06), chance.randint(1, 3)
    if ": " in name:
        stage, _, phase = name.partition(": ")
        inner = moment(phase, chance, start_up=start_up, duration=duration, final_step=final_step, stage=stage)
        return Moment(name, inner.reached, inner.delay)
    if name == "start-up":
        seconds = chance.uniform(0.0, start_up)
        return Moment(name, lambda attempt: attempt.seconds >= seconds or bool(attempt.lines(stage)))
    if name == "random time":
        seconds = chance.uniform(0.0, duration)
        # The machine may be faster now than when the undisturbed run took its time.
        return Moment(name, lambda one: one.seconds >= seconds or one.steps(stage)[-1:] == [final_step])
    if name == "loading":
        return Moment(name, lambda attempt: bool(attempt.lines(stage)), chance.uniform(0, 0.5))
    if name == "step":
        return Moment(name, lambda attempt: len(attempt.steps(stage)) >= steps, soon)
    if name == "validation":
        return Moment(name, lambda attempt: _in_validation(attempt, stage), chance.uniform(0, 0.03))
    if name == "save begun":
        return Moment(name, lambda attempt: bool(_pending(attempt, stage)), chance.uniform(0, 0.03))
    if name == "save written":
        return Moment(name, lambda attempt: any(path.suffix == ".distcp" for path in _pending_files(attempt, stage)))
    if name == "save described":
        return Moment(name, lambda attempt: any(path.name == ".metadata" for path in _pending_files(attempt, stage)))
    if name == "last save":
        return Moment(name, lambda attempt: attempt.steps(stage)[-1:] == [final_step], chance.uniform(0, 0.5))
    if name == "export":
        return Moment(name, lambda attempt: _exporting(attempt, stage), chance.uniform(0, 0.6))
    if name == "results":
        return Moment(name, lambda attempt: any(" rows scored -> " in line for line in attempt.lines(stage)), soon)
    word = {"reference pass": "nemo_align: reference ", "scoring": "nemo_align: score "}[name]
    count = chance.randint(1, 2)
    return Moment(name, lambda attempt: sum(word in line for line in attempt.lines(stage)) >= count, soon)


def _exporting(attempt: Attempt, stage: str) -> bool:
    return bool(attempt.lines(stage)) and (attempt.job.run_dir / stage / "result.json").exists()


def is_in(name: str, attempt: Attempt) -> bool:
    """Whether the run is in that phase right now, as far as its files tell."""
    stage, _, phase = name.rpartition(": ")
    if phase == "start-up":
        return not attempt.lines(stage)
    if phase == "step":
        return bool(attempt.steps(stage))
    if phase == "reference pass":
        return not attempt.steps(stage) and any("nemo_align: reference " in line for line in attempt.lines(stage))
    if phase == "validation":
        return _in_validation(attempt, stage)
    if phase in ("save begun", "save written"):
        return bool(_pending(attempt, stage))
    return True


def _in_validation(attempt: Attempt, stage: str) -> bool:
    """Between the line of a step that is validated and that of the validation."""
    steps, lines = attempt.steps(stage), attempt.lines(stage)
    if not steps or steps[-1] % VALIDATE_EVERY:
        return False
    since = next(index for index in reversed(range(len(lines))) if STEP.search(lines[index]))
    return not any("held out" in line for line in lines[since:])


def _pending(attempt: Attempt, stage: str) -> list[Path]:
    return list((attempt.job.run_dir / stage).glob("checkpoints/.tmp-step_*"))


def _pending_files(attempt: Attempt, stage: str) -> list[Path]:
    found = []
    for folder in _pending(attempt, stage):
        try:
            found += list(folder.iterdir())
        except FileNotFoundError:  # published meanwhile
            continue
    return found
