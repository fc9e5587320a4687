"""The disk fills up: the run ends with path, cause and bytes, the last save stays whole, and with room it goes on."""

from __future__ import annotations

import contextlib

import pytest

from nemo_align.runtime import exit_codes
from nemo_align.training.metrics import read_metrics
from tests.faults import checks
from tests.faults.disks import disk
from tests.faults.runs import Attempt

pytestmark = pytest.mark.full

MEGABYTE = 1 << 20


@pytest.mark.parametrize(
    "case, left, saves",
    [
        ("sft", "nothing", "beside the steps"),
        ("sft", "less than a checkpoint", "between the steps"),
        ("sft", "hardly more than its tensors", "beside the steps"),
        ("reward", "less than a checkpoint", "beside the steps"),  # TP 2
        ("preference", "nothing", "between the steps"),  # PP 2
    ],
)
def test_a_disk_that_fills_up(case, left, saves, undisturbed, disturbed, ledger, tmp_path):
    asynchronous = f"checkpoint.asynchronous={str(saves == 'beside the steps').lower()}"
    with disk(tmp_path / "disk", "size=48m") as small:
        job = disturbed(case, run_dir=small.path / "run")
        attempt = job.start(asynchronous)
        assert attempt.wait_until(lambda one: len(_saves(one)) >= 1), attempt.said()
        tensors = round(_saves(attempt)[0]["save/gigabytes"] * 1e9)
        # What is stored besides the tensors does not fit into 100 KB: names, places, the tokenizer.
        small.fill(leave={"nothing": 0, "less than a checkpoint": MEGABYTE}.get(left, tensors + 100_000))
        code = attempt.wait()
        said = attempt.said()
        checks.nothing_left(attempt)
        assert code == exit_codes.USER_ERROR, said
        assert "Traceback" not in said, said
        assert str(small.path) in said and ("No space left on device" in said or "bytes" in said), said
        ledger.checkpoints_checked += checks.published_are_whole(job.run_dir)
        before = checks.standings(job.run_dir)
        assert before[""].saved >= 2
        small.make_room()
        again = job.finish(asynchronous)
        assert again.process.returncode == exit_codes.SUCCESS, again.said()
        ledger.most_lost = max(ledger.most_lost, checks.went_on(again, before))
        checks.no_temporary_files(job)
        checks.equal(undisturbed(case).outcomes, checks.outcomes(job.run_dir))
    ledger.faults["full disk"] += 1
    ledger.equal_ends += 1


def _saves(attempt: Attempt) -> list[dict]:
    with contextlib.suppress(ValueError):
        return [record for record in read_metrics(attempt.job.run_dir) if record["kind"] == "save"]
    return []
