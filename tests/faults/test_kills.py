"""SIGKILL of one rank, of all ranks or of the command, at seeded moments: nothing but time is lost.

    make test-faults FAULT_KILLS=300
    NEMO_ALIGN_FAULTS_KILLS=300 NEMO_ALIGN_FAULTS_SEED=7 pytest tests/faults/test_kills.py

A run takes several kills in a row, is then left alone, and must end as one that nobody disturbed: the same bits in
every tensor of weights and optimizer, the same records, the same exported files. Every kill that was asked for is made:
one that comes too late is made again in another run, in the end at a moment for which nothing is too late.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from nemo_align.runtime import exit_codes
from tests.faults import checks, moments
from tests.faults.checks import Undisturbed
from tests.faults.moments import moment
from tests.faults.report import DEFAULT_KILLS, Ledger, number_of_kills, seed
from tests.faults.runs import Attempt, Job

pytestmark = pytest.mark.full

PHASES = {
    "pretrain": moments.PRETRAINING,
    "sft": moments.TRAINING,
    "reward": moments.TRAINING,
    "preference": moments.PREFERENCE,
    "score": moments.SCORING,
    "pipeline": moments.PIPELINE,
}
SHARES = {"pretrain": 6, "sft": 8, "reward": 4, "preference": 8, "score": 3, "pipeline": 3}
VICTIMS = ("rank 0", "rank 1", "all", "command")
KILLS_OF_A_RUN = 9
MOST_TRIES = 3


@dataclass(frozen=True)
class Kill:
    phase: str
    victim: str
    tries: int = 0

    def again(self) -> Kill:
        """For another run, as this one ended first."""
        assert self.tries < 2 * MOST_TRIES, f"{self} came too late every time"
        return replace(self, phase=self.phase if self.tries < MOST_TRIES else "start-up", tries=self.tries + 1)


def counts() -> dict[str, int]:
    """Kills of each case, by its share. In sum exactly those that were asked for."""
    found, shares, before = {}, 0, 0
    for case, share in SHARES.items():
        shares += share
        until = round(number_of_kills() * shares / sum(SHARES.values()))
        found[case], before = until - before, until
    return found


def plan(case: str, count: int, chance: random.Random) -> list[Kill]:
    """`count` kills; every phase and every victim gets its turn before one comes again."""
    kills, phases, victims = [], [], []
    for _ in range(count):
        phases = phases or chance.sample(PHASES[case], len(PHASES[case]))
        victims = victims or chance.sample(VICTIMS, len(VICTIMS))
        kills.append(Kill(phases.pop(), victims.pop()))
    return kills


@pytest.mark.parametrize("case", PHASES)
def test_a_killed_run_ends_as_an_undisturbed_one(case, undisturbed, disturbed, ledger, tmp_path):
    count = counts()[case]
    if count == 0:
        pytest.skip("so few kills were asked for that none is left for this case")
    ledger.planned_kills[case] += count
    chance = random.Random(f"{seed()} {case}")
    kills = plan(case, count, chance)
    number = survived = 0
    while kills:
        job = disturbed(case, tmp_path / f"run_{number}")
        number += 1
        complete = False
        of_this_run, kills = kills[:KILLS_OF_A_RUN], kills[KILLS_OF_A_RUN:]
        of_this_run.sort(key=lambda kill: _turn(case, kill.phase))
        while of_this_run and not complete:
            kill = of_this_run.pop(0)
            complete = not _kill(kill, job, chance, undisturbed(case), ledger)
            survived += not complete
            if complete:  # the run was quicker
                ledger.late[kill.phase] += 1
                kills = [*of_this_run, *kills, kill.again()]
        if not complete:
            _start(job, ledger, lambda attempt: attempt.wait())
        assert job.attempts[-1].process.returncode == exit_codes.SUCCESS, job.attempts[-1].said()
        checks.no_temporary_files(job)
        checks.equal(undisturbed(case).outcomes, checks.outcomes(job.run_dir))
        ledger.equal_ends += 1
    assert survived == count


def test_as_many_kills_are_planned_as_were_asked_for():
    assert sum(counts().values()) == number_of_kills()
    assert list(counts()) == list(PHASES) and DEFAULT_KILLS >= 30


def _turn(case: str, phase: str) -> int:
    """Stages of a pipeline in their order; else only the last phases last: once a run is there, the others are over."""
    place = PHASES[case].index(phase)
    return place if case == "pipeline" else int(place >= len(PHASES[case]) - 2)


def _kill(kill: Kill, job: Job, chance: random.Random, known: Undisturbed, ledger: Ledger) -> bool:
    """Start, kill, and look what is left. False if the command had ended well before."""
    when = moment(kill.phase, chance, start_up=known.start_up, duration=known.duration, final_step=known.final_step)
    killed: list[int] = []

    def disturb(attempt: Attempt) -> None:
        if when.await_in(attempt):
            killed.extend(attempt.strike(kill.victim))
        if kill.victim != "command" and not killed and attempt.wait_until(lambda one: bool(one.ranks())):
            killed.extend(attempt.strike(kill.victim))  # the workers were not there yet
        attempt.wait()

    attempt = _start(job, ledger, disturb)
    code = attempt.process.returncode
    if code == exit_codes.SUCCESS:
        return False
    told = f"{kill} in start {len(job.attempts)}, seed {seed()}\n{attempt.said()[-3000:]}"
    if kill.victim == "command":
        assert code == -signal.SIGKILL, told
    else:
        assert killed and code == 128 + signal.SIGKILL, told
        named = [f"worker {rank} of 2 ended with signal SIGKILL" for rank in killed]
        assert any(text in attempt.said() for text in named), told
    ledger.kills[known.case.name, kill.phase, kill.victim] += 1
    return True


def _start(job: Job, ledger: Ledger, disturb: Callable[[Attempt], object]) -> Attempt:
    """Start the command, disturb it to its end, and check what must hold whatever happened."""
    before = checks.standings(job.run_dir)
    attempt = job.start()
    disturb(attempt)
    checks.nothing_left(attempt)
    ledger.checkpoints_checked += checks.published_are_whole(job.run_dir)
    ledger.most_lost = max(ledger.most_lost, checks.went_on(attempt, before))
    return attempt
