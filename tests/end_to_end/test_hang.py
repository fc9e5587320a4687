"""A rank that freezes in the middle of training, under the real command with two ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from nemo_align.runtime import exit_codes
from nemo_align.training.metrics import read_metrics
from tests.distributed.stage_runs import numbers
from tests.end_to_end.commands import command, environment
from tests.stage_inputs import MODEL, stage_overrides

# Long enough for a step on a busy machine; start-up, with its imports, has more.
HANG = "runtime.hang_timeout_minutes=0.5"


def frozen_in_training(rank: int, *arguments: str, cwd: Path) -> tuple[int, str, list[int]]:
    """(exit code, stderr, pids of the first workers) of a command whose worker `rank` is stopped after step 5."""
    process = subprocess.Popen(
        command(*arguments), cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 240
        while not any(record["kind"] == "train" and record["step"] >= 5 for record in read_metrics(cwd / "run")):
            assert process.poll() is None and time.monotonic() < deadline, "step 5 did not come"
            time.sleep(0.02)
        workers = {
            int(child.environ()["NEMO_ALIGN_RANK"]): child.pid for child in psutil.Process(process.pid).children()
        }
        os.kill(workers[rank], signal.SIGSTOP)
        _, said = process.communicate(timeout=300)
        return process.returncode, said, list(workers.values())
    finally:
        process.kill()  # its workers go with it
        process.wait()


def arguments(stage_inputs, *more: str) -> list[str]:
    steps = ["train.max_steps=60", "train.validate_every=null", "checkpoint.save_every=2"]
    return ["sft", *MODEL, *stage_overrides(stage_inputs, "sft"), *steps, "parallel.data=2", "run_dir=run", *more]


def losses(run_dir: Path) -> list[dict]:
    return numbers(read_metrics(run_dir), "train")


@pytest.mark.full
def test_a_frozen_rank_is_named_and_its_run_goes_on(stage_inputs, tmp_path):
    texts = arguments(stage_inputs, HANG, "runtime.max_restarts=1")
    code, said, pids = frozen_in_training(1, *texts, cwd=tmp_path)
    assert code == exit_codes.SUCCESS, said
    assert f"no answer from rank 1 (host {os.uname().nodename}, pid" in said
    assert "worker 1 of 2 does not answer: stopped (state T), last known: " in said
    assert "restart 1 of 1: worker 1 did not answer; resuming from checkpoints/step_00000" in said
    stacks = (tmp_path / "run" / "hang" / "rank_0.earlier.txt").read_text()
    assert "it was last at: training step" in stacks
    assert "distributed_c10d.py" in stacks  # it waits in a collective
    assert "run_step" in stacks
    assert not [pid for pid in pids if psutil.pid_exists(pid)]

    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    done = subprocess.run(
        command(*arguments(stage_inputs)),
        cwd=undisturbed,
        env=environment(),
        capture_output=True,
        timeout=300,
        check=True,
    )
    assert done.returncode == 0
    assert losses(tmp_path / "run") == losses(undisturbed / "run")


@pytest.mark.full
def test_when_rank_0_freezes_the_lowest_rank_that_answers_names_it(stage_inputs, tmp_path):
    texts = arguments(stage_inputs, HANG, "runtime.max_restarts=0")
    code, said, pids = frozen_in_training(0, *texts, cwd=tmp_path)
    assert code == exit_codes.HUNG, said
    assert "worker 0 of 2 does not answer: stopped (state T)" in said
    assert "no answer from rank 0 (host" in said  # the last lines of rank 1's log
    assert "restart" not in said
    assert [path.name for path in (tmp_path / "run" / "hang").iterdir()] == ["rank_1.txt"]
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
