"""SIGTERM and SIGUSR1 in every phase: exit code 75, not one step lost, and the same end."""

from __future__ import annotations

import contextlib
import random
import signal

import psutil
import pytest

from nemo_align.runtime import exit_codes
from tests.faults import checks
from tests.faults.checks import Undisturbed
from tests.faults.moments import moment
from tests.faults.report import Ledger, seed
from tests.faults.runs import Attempt, Job

pytestmark = pytest.mark.full

PHASES = {
    "pretrain": ("loading", "save begun", "last save"),
    "sft": ("start-up", "loading", "step", "validation", "save written", "last save"),
    "preference": ("start-up", "reference pass", "reference pass", "step", "export"),
    "score": ("scoring",),
    "pipeline": ("reward: step", "dpo: reference pass"),
}
# A user or SLURM's --signal=B: reaches the command, scancel all processes, and a kill by hand any one of them.
TARGETS = ("command", "everything", "rank 1")
LAST = ("last save", "export")
MOST_RUNS = 4


@pytest.mark.parametrize("case", PHASES)
def test_a_stopped_run_has_lost_nothing(case, undisturbed, disturbed, ledger, tmp_path):
    chance = random.Random(f"{seed()} stop {case}")
    phases = list(enumerate(PHASES[case]))
    for number in range(MOST_RUNS):
        if not phases:
            break
        job = disturbed(case, tmp_path / f"run_{number}")
        complete = False
        while phases and not complete:
            turn, phase = phases.pop(0)
            stop = (signal.SIGTERM, signal.SIGUSR1)[turn % 2]
            in_time, complete = _stop(job, phase, stop, chance, undisturbed(case), ledger)
            if not in_time:
                ledger.late[phase] += 1
                phases.append((turn, phase))
        if not complete:
            assert job.finish().process.returncode == exit_codes.SUCCESS, job.attempts[-1].said()
        checks.no_temporary_files(job)
        checks.equal(undisturbed(case).outcomes, checks.outcomes(job.run_dir))
        ledger.equal_ends += 1
    assert len(phases) < len(PHASES[case]), "every signal came too late"


def _stop(
    job: Job, phase: str, stop: signal.Signals, chance: random.Random, known: Undisturbed, ledger: Ledger
) -> tuple[bool, bool]:
    """Start, send the signal, and look what is left: whether it came in time, and whether the run is complete."""
    case = known.case.name
    target = "command" if case == "pipeline" else chance.choice(TARGETS)
    when = moment(phase, chance, start_up=known.start_up, duration=known.duration, final_step=known.final_step)
    before = checks.standings(job.run_dir)
    attempt = job.start()
    reached = when.await_in(attempt)
    if reached:
        _send(attempt, stop, target)
    code = attempt.wait()
    told = f"{case}: {stop.name} to {target} at {phase}, start {len(job.attempts)}\n{attempt.said()[-3000:]}"
    checks.nothing_left(attempt)
    ledger.checkpoints_checked += checks.published_are_whole(job.run_dir)
    checks.went_on(attempt, before)
    complete = code == exit_codes.SUCCESS
    # What remains after the last step is finished in spite of the signal.
    if complete and not (reached and phase in LAST):
        return False, True
    # In the first moments of the command Python itself ends it, which has started nothing by then; in its last ones
    # too, when all is done.
    bare = code == -stop and (not attempt.lines() or (job.run_dir / "result.json").exists())
    assert reached and (complete or bare or code == exit_codes.STOPPED_AFTER_SAVING), told
    assert "Traceback" not in attempt.said(), told
    lost = max((place.logged - place.saved for place in checks.standings(job.run_dir).values()), default=0)
    assert lost == 0, f"{lost} steps lost\n{told}"
    ledger.stops[case, phase, stop.name] += 1
    ledger.most_lost_after_stop = max(ledger.most_lost_after_stop, lost)
    return True, complete


def _send(attempt: Attempt, number: int, target: str) -> None:
    ranks = attempt.ranks()
    if target == "rank 1" and 1 in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks[1].send_signal(number)
        return
    attempt.send(number)
    if target == "everything":
        for process in ranks.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
