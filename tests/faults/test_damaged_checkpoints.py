"""A damaged newest checkpoint is passed over for the one before, with a warning that names the file."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_align.checkpoint import store
from nemo_align.runtime import exit_codes
from tests.faults import checks
from tests.faults.report import seed
from tests.faults.runs import Job

pytestmark = pytest.mark.full


def truncated(path: Path, chance: random.Random) -> None:
    size = path.stat().st_size
    with open(path, "r+b") as stream:
        stream.truncate(chance.randrange(size))


def flipped(path: Path, chance: random.Random) -> None:
    """One bit, anywhere."""
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def deleted(path: Path, chance: random.Random) -> None:
    path.unlink()


def zeroed(path: Path, chance: random.Random) -> None:
    """A block of zeros, as a file system leaves behind that lost its power."""
    before = data = path.read_bytes()
    while data == before:
        begin = chance.randrange(len(before))
        end = min(begin + 512, len(before))
        data = before[:begin] + bytes(end - begin) + before[end:]
    path.write_bytes(data)


DAMAGES = [
    ("__0_0.distcp", truncated),
    ("__1_0.distcp", flipped),
    ("__1_0.distcp", deleted),
    (".metadata", flipped),
    ("common.pt", zeroed),
    ("manifest.json", truncated),
    ("tokenizer/tokenizer.model", flipped),
]


@pytest.fixture(scope="module")
def killed(undisturbed, tmp_path_factory) -> Path:
    """A run directory with two whole checkpoints, as a kill left it."""
    folder = tmp_path_factory.mktemp("killed")
    job = Job(undisturbed("sft").case.arguments, folder)
    attempt = job.start()
    assert attempt.wait_until(lambda one: len(store.candidates(job.run_dir)) >= 2), attempt.said()
    attempt.strike("command")
    attempt.wait()
    checks.nothing_left(attempt)
    return job.run_dir


@pytest.fixture
def another(killed, disturbed) -> Callable[[], Job]:
    def copy() -> Job:
        job = disturbed("sft")
        shutil.copytree(killed, job.run_dir)
        return job

    return copy


@pytest.mark.parametrize("name, damage", DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_the_one_before_is_used(name, damage, another, undisturbed, ledger):
    job = another()
    newest, before = store.candidates(job.run_dir)[:2]
    path = newest / name
    damage(path, random.Random(f"{seed()} {name} {damage.__name__}"))
    attempt = job.finish()
    said = attempt.said()
    assert attempt.process.returncode == exit_codes.SUCCESS, said
    warnings = [line for line in said.splitlines() if "is damaged and skipped" in line]
    assert len(warnings) == 1 and str(newest) in warnings[0] and Path(name).name in warnings[0], said
    resumed = attempt.resumed()
    assert resumed is not None and resumed[0] == before, said
    _ends_equal(job, undisturbed, ledger)
    ledger.refused += 1
    ledger.faults["damaged checkpoint"] += 1


def test_with_all_of_them_damaged_the_run_begins_anew(another, undisturbed, ledger):
    job = another()
    every = store.candidates(job.run_dir)
    for path in every:
        flipped(path / "__0_0.distcp", random.Random(seed()))
    attempt = job.finish()
    assert attempt.process.returncode == exit_codes.SUCCESS, attempt.said()
    assert attempt.said().count("is damaged and skipped") == len(every)
    assert attempt.resumed() is None
    _ends_equal(job, undisturbed, ledger)
    ledger.refused += len(every)
    ledger.faults["damaged checkpoint"] += 1


def _ends_equal(job: Job, undisturbed, ledger) -> None:
    checks.nothing_left(job.attempts[-1])
    checks.no_temporary_files(job)
    ledger.checkpoints_checked += checks.published_are_whole(job.run_dir)
    checks.equal(undisturbed("sft").outcomes, checks.outcomes(job.run_dir))
    ledger.equal_ends += 1
