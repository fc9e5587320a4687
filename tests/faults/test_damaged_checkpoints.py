"""A damaged newest checkpoint is passed over for the one before, with a warning that names the file."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_align.checkpoint import store
from nemo_align.runtime import exit_codes
from tests.faults import checks
from tests.faults.checks import Undisturbed
from tests.faults.report import Ledger, seed
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


def digit_changed(path: Path, chance: random.Random) -> None:
    """In a count of the state that a resumed run goes on from: the file stays valid JSON with all of its keys."""
    text = path.read_text()
    begin = text.index('"state"')
    counts = re.finditer(r"(?<=: )\d+(?=,\n)", text[begin : text.index("}", begin)])
    place = begin + chance.choice([place for count in counts for place in range(*count.span())])
    other = chance.choice([digit for digit in "123456789" if digit != text[place]])
    path.write_text(text[:place] + other + text[place + 1 :])


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
    ("sft", "__0_0.distcp", truncated),
    ("sft", "__1_0.distcp", flipped),
    ("sft", "__1_0.distcp", deleted),
    ("sft", ".metadata", flipped),
    ("sft", "common.pt", zeroed),
    ("sft", "manifest.json", truncated),
    ("sft", "manifest.json", digit_changed),
    ("sft", "tokenizer/tokenizer.model", flipped),
    ("reward", "__1_0.distcp", flipped),  # TP 2
    ("preference", "__0_0.distcp", deleted),  # PP 2
]


@pytest.fixture(scope="module")
def killed(undisturbed, tmp_path_factory) -> Callable[[str], Path]:
    """The run directory of a case with two whole checkpoints, as a kill left it when it was first asked for."""
    run_dirs: dict[str, Path] = {}

    def of(case: str) -> Path:
        if case not in run_dirs:
            job = Job(undisturbed(case).case.arguments, tmp_path_factory.mktemp(f"killed_{case}"))
            attempt = job.start()
            assert attempt.wait_until(lambda one: len(store.candidates(job.run_dir)) >= 2), attempt.said()
            attempt.strike("command")
            attempt.wait()
            checks.nothing_left(attempt)
            run_dirs[case] = job.run_dir
        return run_dirs[case]

    return of


@pytest.fixture
def another(killed, disturbed) -> Callable[[str], Job]:
    def copy(case: str) -> Job:
        job = disturbed(case)
        shutil.copytree(killed(case), job.run_dir)
        return job

    return copy


@pytest.mark.parametrize("case, name, damage", DAMAGES, ids=lambda value: getattr(value, "__name__", value))
def test_the_one_before_is_used(case, name, damage, another, undisturbed, ledger):
    job = another(case)
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
    _ends_equal(job, undisturbed(case), ledger)
    ledger.refused += 1
    ledger.faults["damaged checkpoint"] += 1


def test_with_all_of_them_damaged_the_run_begins_anew(another, undisturbed, ledger):
    job = another("sft")
    every = store.candidates(job.run_dir)
    for path in every:
        flipped(path / "__0_0.distcp", random.Random(seed()))
    attempt = job.finish()
    assert attempt.process.returncode == exit_codes.SUCCESS, attempt.said()
    assert attempt.said().count("is damaged and skipped") == len(every)
    assert attempt.resumed() is None
    _ends_equal(job, undisturbed("sft"), ledger)
    ledger.refused += len(every)
    ledger.faults["damaged checkpoint"] += 1


def _ends_equal(job: Job, known: Undisturbed, ledger: Ledger) -> None:
    checks.nothing_left(job.attempts[-1])
    checks.no_temporary_files(job)
    ledger.checkpoints_checked += checks.published_are_whole(job.run_dir)
    checks.equal(known.outcomes, checks.outcomes(job.run_dir))
    ledger.equal_ends += 1
