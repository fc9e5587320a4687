"""slurm/train.sbatch on two nodes: the numbers of a run without SLURM, also over a time limit; what scancel means."""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from nemo_align.runtime import exit_codes, starts
from tests.distributed.checkpoint_runs import assert_equal
from tests.end_to_end import commands
from tests.slurm.conftest import outcome
from tests.stage_inputs import MODEL, stage_overrides

pytestmark = pytest.mark.full

# Tensor and data parallel, so that one group lies within a node and the other across both; 4 tasks.
LAYOUT = ["parallel.tensor=2", "parallel.data=2"]
# Long enough to be met while it trains.
LONG = ["train.max_steps=60", "checkpoint.save_every=200"]


def sft(inputs, *extra: str) -> list[str]:
    return ["sft", *MODEL, *stage_overrides(inputs, "sft"), *extra]


def assert_same(found, expected) -> None:
    assert found[0] == expected[0] and found[1] == expected[1]
    assert_equal(found[2], expected[2])


def test_two_nodes_give_the_numbers_of_one_machine(cluster, train, stage_inputs, tmp_path):
    arguments = sft(stage_inputs, *LAYOUT)
    job = train(*arguments, tasks=2)
    local = commands.run(*arguments, "run_dir=local", cwd=tmp_path)
    assert local.returncode == 0, local.stderr
    assert job.wait() == "COMPLETED", job.text()
    assert_same(job.outcome(), outcome(tmp_path / "local"))
    (start,) = starts.read(job.run_dir)
    assert (start.job_id, start.nodes, start.ranks, start.reason) == (job.id, "127.0.0.[1-2]", 4, "complete")
    assert f"job {job.id} start 0 of it, nodes 127.0.0.[1-2]: nemo-align sft" in job.text()
    assert cluster.job(job.id)["NodeList"] == "127.0.0.[1-2]"


def test_over_a_time_limit_a_run_ends_as_if_there_were_none(cluster, train, stage_inputs, tmp_path):
    """The limit comes while the run trains: it saves, SLURM queues the job again, and it goes on where it was."""
    arguments = sft(stage_inputs, *LONG)
    job = train(*arguments, tasks=1, nodes=2, options=["--time=60", "--signal=TERM@180"])
    job.wait_for_step(3)
    # Frozen until the signal comes, so that the run may be short: SLURM looks at time limits twice a minute.
    tasks = job.tasks()
    assert len(tasks) == 2
    for pid in tasks:
        os.kill(pid, signal.SIGSTOP)
    job.set_time_limit(minutes_left=3)

    def queued_again() -> bool:
        for pid in filter(has_sigterm, tasks):  # SLURM 22.05 wakes them itself
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        now = cluster.job(job.id)
        return now["Restarts"] == "1" and now["JobState"] == "PENDING"

    cluster.wait(queued_again, "the job to be queued again", seconds=120)
    cluster.start_soon(job.id, "TimeLimit=60")  # once is enough
    assert job.wait() == "COMPLETED", job.text()

    first, second = starts.read(job.run_dir)
    assert (first.code, first.reason) == (exit_codes.STOPPED_AFTER_SAVING, "stopped by SIGTERM")
    assert (second.job_id, second.job_restarts, second.nodes) == (job.id, 1, "127.0.0.[1-2]")
    why = rf"job {job.id} was told to stop and has saved, \S+ before its time limit: back into the queue, after 0 "
    assert re.search(why, job.text())
    assert "resumed" in (job.run_dir / "log.txt").read_text()
    local = commands.run(*arguments, "parallel.data=2", "run_dir=local", cwd=tmp_path)
    assert local.returncode == 0, local.stderr
    assert_same(job.outcome(), outcome(tmp_path / "local"))


def test_a_killed_rank_costs_the_steps_since_the_newest_checkpoint(cluster, train, stage_inputs, tmp_path):
    arguments = sft(stage_inputs, "train.max_steps=60", "checkpoint.save_every=10")
    job = train(*arguments, tasks=1, nodes=2)
    job.wait_for_step(15)
    os.kill(job.tasks()[-1], signal.SIGKILL)

    def queued_again() -> bool:
        now = cluster.job(job.id)
        return now["Restarts"] == "1" and now["JobState"] == "PENDING"

    cluster.wait(queued_again, "the job to be queued again", seconds=120)
    cluster.start_soon(job.id)
    assert job.wait() == "COMPLETED", job.text()
    said = job.text()
    assert re.search(r"failed with exit code \d+, time 1 from this checkpoint \(none yet\), ", said), said
    assert re.search(r"resumed run/checkpoints/step_0+[1-9]0 at step", said), said
    local = commands.run(*arguments, "parallel.data=2", "run_dir=local", cwd=tmp_path)
    assert local.returncode == 0, local.stderr
    assert_same(job.outcome(), outcome(tmp_path / "local"))
    assert not list(tmp_path.glob(".nemo_align*"))


def has_sigterm(pid: int) -> bool:
    """Whether SIGTERM waits for a process that is stopped."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    pending = int(re.search(r"^ShdPnd:\s*(\w+)$", status, re.MULTILINE)[1], 16)
    return bool(pending >> (signal.SIGTERM - 1) & 1)


def test_a_cancelled_job_saves_and_is_not_queued_again(cluster, train, stage_inputs):
    job = train(*sft(stage_inputs, *LONG), tasks=1, nodes=2)
    job.wait_for_step(2)
    cluster.run("scancel", job.id)
    assert job.wait() == "CANCELLED", job.text()
    assert cluster.job(job.id)["Restarts"] == "0" and "back into the queue" not in job.text()
    (start,) = starts.read(job.run_dir)
    assert (start.code, start.reason) == (exit_codes.STOPPED_AFTER_SAVING, "stopped by SIGTERM")
    assert list((job.run_dir / "checkpoints").glob("step_*"))


def test_a_job_told_to_stop_without_requeue_ends_after_saving(cluster, train, stage_inputs):
    """docs/cluster.md: how to stop a run for good with its last step saved, however long the save takes."""
    job = train(*sft(stage_inputs, *LONG), tasks=1, nodes=2)
    job.wait_for_step(2)
    cluster.run("scontrol", "update", f"JobId={job.id}", "Requeue=0")
    cluster.run("scancel", "--signal=TERM", job.id)
    assert job.wait() == "FAILED", job.text()
    assert cluster.job(job.id)["ExitCode"] == f"{exit_codes.STOPPED_AFTER_SAVING}:0"
    assert "could not be queued again" in job.text()
    assert list((job.run_dir / "checkpoints").glob("step_*"))


def test_a_mistake_ends_the_job_with_its_code(cluster, train, stage_inputs):
    job = train(*sft(stage_inputs, "optimzer.lr=1"), tasks=1, nodes=1)
    assert job.wait() == "FAILED"
    assert cluster.job(job.id)["ExitCode"] == f"{exit_codes.USER_ERROR}:0"
    assert "unknown key 'optimzer.lr'; did you mean 'optimizer.lr'?" in job.text()


def test_a_verb_without_ranks_is_one_process(cluster, train, stage_inputs):
    job = train("plan", "verb=sft", *MODEL, *stage_overrides(stage_inputs, "sft"), "gpus=4", tasks=2)
    assert job.wait() == "COMPLETED", job.text()
    assert job.text().count("checkpoint: ") == 1


def test_a_chain_is_no_job_of_this_script(cluster, train):
    job = train("pipeline", "+experiment=quickstart/short", tasks=1, nodes=1)
    assert job.wait() == "FAILED"
    assert cluster.job(job.id)["ExitCode"] == f"{exit_codes.USER_ERROR}:0"
    assert "nemo-align pipeline cluster=slurm on a login node" in job.text()


def test_the_doctor_on_the_nodes_of_a_job(train, stage_inputs):
    arguments = ["verb=sft", *MODEL, *stage_overrides(stage_inputs, "sft"), *LAYOUT]
    job = train("doctor", *arguments, tasks=2)
    state = job.wait()
    said = job.text()
    assert re.search(r"disk +2 nodes see the same files", said), said
    assert re.search(r"links +data: 2 groups, all-reduce .* on 127\.0\.0\.1, 127\.0\.0\.2\)", said), said
    # The two nodes share this machine's cores, so one may look slow; nothing else may be wrong.
    wrong = [line for line in said.splitlines() if re.match(r"\d+: failed", line)]
    assert all(" is slow: " in line for line in wrong), said
    assert state == ("FAILED" if wrong else "COMPLETED")
