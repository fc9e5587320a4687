"""What the launcher mends by itself: ranks that are killed, and ranks that stand still."""

from __future__ import annotations

import random
import signal
import time

import psutil
import pytest

from nemo_align.runtime import exit_codes
from tests.faults import checks
from tests.faults.report import seed
from tests.faults.runs import Attempt

pytestmark = pytest.mark.full

HANG_SECONDS = 12.0  # a step takes a tenth of a second: silence for so long is a hang even on a busy machine


def test_killed_ranks_are_started_again(undisturbed, disturbed, ledger):
    """Rank 1, rank 0 and both, one after the other, in one command that goes on each time."""
    chance = random.Random(f"{seed()} restarts")
    job = disturbed("sft", extra=["runtime.max_restarts=3"])
    attempt = job.start()
    for number, victim in enumerate(("rank 1", "rank 0", "all"), start=1):
        begun = 3 * number  # further than the restart before, so that it counts as progress
        assert attempt.wait_until(lambda one, begun=begun: one.steps()[-1:] >= [begun]), attempt.said()
        time.sleep(chance.uniform(0, 0.05))
        assert attempt.strike(victim), attempt.said()
        assert attempt.wait_until(lambda one, n=number: one.said().count("\nrestart ") >= n), attempt.said()
        ledger.mended[victim] += 1
    assert attempt.wait() == exit_codes.SUCCESS, attempt.said()
    assert "was killed by SIGKILL; resuming from checkpoints/step_" in attempt.said()
    _ends_equal(attempt, undisturbed, ledger)


def test_a_frozen_rank_is_named_and_the_run_goes_on(undisturbed, disturbed, ledger):
    rank = 0
    job = disturbed("sft", extra=[f"runtime.hang_timeout_minutes={HANG_SECONDS / 60}", "runtime.max_restarts=1"])
    attempt = job.start()
    assert attempt.wait_until(lambda one: one.steps()[-1:] >= [5]), attempt.said()
    frozen = attempt.ranks()[rank]
    frozen.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    assert attempt.wait_until(lambda one: "restart 1 of 1" in one.said()), attempt.said()
    ledger.longest_hang = max(ledger.longest_hang, time.monotonic() - begin)
    assert attempt.wait() == exit_codes.SUCCESS, attempt.said()
    said = "".join([attempt.said(), *(path.read_text() for path in job.run_dir.glob("logs/rank_*.txt"))])
    assert f"no answer from rank {rank} (host " in said and f"pid {frozen.pid})" in said, said
    assert f"worker {rank} of 2 does not answer" in said, said
    assert f"restart 1 of 1: worker {rank} did not answer; resuming from checkpoints/step_" in said, said
    stacks = [path for path in job.run_dir.glob("hang/rank_*.txt") if f"rank_{1 - rank}" in path.name]
    assert stacks and "Thread" in stacks[0].read_text(), list(job.run_dir.glob("hang/*"))
    assert not psutil.pid_exists(frozen.pid)
    _ends_equal(attempt, undisturbed, ledger)
    ledger.faults["frozen rank"] += 1


def test_without_restarts_a_hang_has_its_own_exit_code(undisturbed, disturbed, ledger):
    job = disturbed("sft", extra=[f"runtime.hang_timeout_minutes={HANG_SECONDS / 60}"])
    attempt = job.start()
    assert attempt.wait_until(lambda one: one.steps()[-1:] >= [3]), attempt.said()
    attempt.ranks()[1].send_signal(signal.SIGSTOP)
    assert attempt.wait() == exit_codes.HUNG, attempt.said()
    before = checks.standings(job.run_dir)
    checks.nothing_left(attempt)
    again = job.finish()
    assert again.process.returncode == exit_codes.SUCCESS, again.said()
    ledger.most_lost = max(ledger.most_lost, checks.went_on(again, before))
    _ends_equal(again, undisturbed, ledger)
    ledger.faults["frozen rank"] += 1


def _ends_equal(attempt: Attempt, undisturbed, ledger) -> None:
    checks.nothing_left(attempt)
    checks.no_temporary_files(attempt.job)
    ledger.checkpoints_checked += checks.published_are_whole(attempt.job.run_dir)
    checks.equal(undisturbed("sft").outcomes, checks.outcomes(attempt.job.run_dir))
    ledger.equal_ends += 1
