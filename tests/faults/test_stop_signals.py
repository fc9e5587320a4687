"""SIGTERM and SIGUSR1 in every phase: exit code 75, not one step lost, and the same end."""

from __future__ import annotations

import contextlib
import random
import signal

import psutil
import pytest

from nemo_align.runtime import exit_codes
from tests.faults import checks
from tests.faults.moments import moment
from tests.faults.report import seed
from tests.faults.runs import Attempt

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


@pytest.mark.parametrize("case", PHASES)
def test_a_stopped_run_has_lost_nothing(case, undisturbed, disturbed, ledger):
    known = undisturbed(case)
    chance = random.Random(f"{seed()} stop {case}")
    job = disturbed(case)
    code = None
    for number, phase in enumerate(PHASES[case]):
        stop = (signal.SIGTERM, signal.SIGUSR1)[number % 2]
        target = "command" if case == "pipeline" else TARGETS[chance.randrange(3)]
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
        if code == exit_codes.SUCCESS:
            ledger.late[phase] += 1
            break
        # In the first moments of the command Python itself ends it, which has started nothing by then; in its last ones
        # too, when all is done.
        bare = code == -stop and (not attempt.lines() or (job.run_dir / "result.json").exists())
        assert reached and (bare or code == exit_codes.STOPPED_AFTER_SAVING), told
        assert "Traceback" not in attempt.said(), told
        lost = max((place.logged - place.saved for place in checks.standings(job.run_dir).values()), default=0)
        assert lost == 0, f"{lost} steps lost\n{told}"
        ledger.stops[case, phase, stop.name] += 1
        ledger.most_lost_after_stop = max(ledger.most_lost_after_stop, lost)
    if code != exit_codes.SUCCESS:
        assert job.finish().process.returncode == exit_codes.SUCCESS, job.attempts[-1].said()
    checks.no_temporary_files(job)
    checks.equal(known.outcomes, checks.outcomes(job.run_dir))
    ledger.equal_ends += 1


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
