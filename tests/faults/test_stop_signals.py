"""SIGTERM and SIGUSR1 in every phase: exit code 75, not one step lost, and the same end."""

from __future__ import annotations

import contextlib
import random
import signal
from dataclasses import dataclass

import psutil
import pytest

from nemo_align.runtime import exit_codes
from tests.faults import checks
from tests.faults.checks import Undisturbed
from tests.faults.moments import is_in, moment
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
# These are short and come when the run is as good as done: a signal there is tried, and may be late every time.
LAST = ("last save", "export")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A user or SLURM's --signal=B: reaches the command, scancel all processes, and a kill by hand any one of them.
TARGETS = ("command", "everything", "rank 1")
MOST_TRIES = 4


@dataclass
class Stop:
    phase: str
    signal: signal.Signals
    tries: int = 0

    @property
    def required(self) -> bool:
        return self.phase not in LAST


def plan(case: str) -> list[Stop]:
    """One signal for each phase, either of them before one comes again."""
    chance, signals, stops = random.Random(f"{seed()} signals {case}"), [], []
    for phase in PHASES[case]:
        signals = signals or chance.sample(SIGNALS, len(SIGNALS))
        stops.append(Stop(phase, signals.pop()))
    return stops


def test_the_plan_has_both_signals_and_every_kind_of_phase():
    required = [stop for case in PHASES for stop in plan(case) if stop.required]
    assert {stop.signal for stop in required} == set(SIGNALS)
    kinds = {stop.phase.rpartition(": ")[2] for stop in required}
    assert kinds >= {"start-up", "step", "validation", "save begun", "save written", "reference pass", "scoring"}


@pytest.mark.parametrize("case", PHASES)
def test_a_stopped_run_has_lost_nothing(case, undisturbed, disturbed, ledger, tmp_path):
    chance = random.Random(f"{seed()} stop {case}")
    stops = plan(case)
    for stop in stops:
        ledger.planned_stops[case, stop.phase, stop.signal.name] += stop.required
    number = 0
    while stops:
        job = disturbed(case, tmp_path / f"run_{number}")
        number += 1
        complete = False
        while stops and not complete:
            stop = stops.pop(0)
            struck, complete = _stop(job, stop, chance, undisturbed(case), ledger)
            if not struck:
                ledger.late[stop.phase] += 1
                stop.tries += 1
                assert stop.tries < MOST_TRIES or not stop.required, f"{stop} came too late every time"
                stops += [stop] if stop.tries < MOST_TRIES else []
        if not complete:
            assert job.finish().process.returncode == exit_codes.SUCCESS, job.attempts[-1].said()
        checks.no_temporary_files(job)
        checks.equal(undisturbed(case).outcomes, checks.outcomes(job.run_dir))
        ledger.equal_ends += 1


def _stop(job: Job, stop: Stop, chance: random.Random, known: Undisturbed, ledger: Ledger) -> tuple[bool, bool]:
    """Start, send the signal, and look what is left: whether it struck in its phase, and whether the run is over."""
    case, number, phase = known.case.name, stop.signal, stop.phase
    target = "command" if case == "pipeline" else chance.choice(TARGETS)
    when = moment(phase, chance, start_up=known.start_up, duration=known.duration, final_step=known.final_step)
    before = checks.standings(job.run_dir)
    attempt = job.start()
    reached = when.await_in(attempt)
    if reached:
        _send(attempt, number, target)
    in_phase = reached and is_in(phase, attempt)  # still, when it had been sent
    code = attempt.wait()
    told = f"{case}: {number.name} to {target} at {phase}, start {len(job.attempts)}\n{attempt.said()[-3000:]}"
    checks.nothing_left(attempt)
    ledger.checkpoints_checked += checks.published_are_whole(job.run_dir)
    checks.went_on(attempt, before)
    complete = code == exit_codes.SUCCESS
    # What remains after the last step is finished in spite of the signal.
    if complete and not (reached and phase in LAST):
        return False, True
    # In the first moments of the command Python itself ends it, which has started nothing by then; in its last ones
    # too, when all is done.
    bare = code == -number and (not attempt.lines() or (job.run_dir / "result.json").exists())
    assert reached and (complete or bare or code == exit_codes.STOPPED_AFTER_SAVING), told
    assert "Traceback" not in attempt.said(), told
    lost = max((place.logged - place.saved for place in checks.standings(job.run_dir).values()), default=0)
    assert lost == 0, f"{lost} steps lost\n{told}"
    ledger.most_lost_after_stop = max(ledger.most_lost_after_stop, lost)
    ledger.stops[case, phase if in_phase else "beside its phase", number.name] += 1
    return in_phase, complete


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
