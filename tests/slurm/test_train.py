"""slurm/train.sbatch on two nodes: the numbers of a run without SLURM, also over a time limit; what scancel means."""

import pytest

from nemo_align.runtime import exit_codes, starts
from tests.distributed.checkpoint_runs import assert_equal
from tests.end_to_end import commands
from tests.slurm.conftest import outcome
from tests.stage_inputs import MODEL, stage_overrides

pytestmark = pytest.mark.full

# Tensor and data parallel, so that one group lies within a node and the other across both; 4 tasks.
LAYOUT = ["parallel.tensor=2", "parallel.data=2"]
# A run that lasts over the signal of the time limit below on any machine.
LONG = ["train.max_steps=700", "checkpoint.save_every=200", "train.log_every=1", "train.global_batch_size=32"]


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
    # SLURM looks twice a minute, so the signal comes 10 to 40 s after the start.
    job = train(*arguments, tasks=1, nodes=2, options=["--time=2", "--signal=TERM@80"])
    assert job.wait() == "COMPLETED", job.text()
    begun = starts.read(job.run_dir)
    restarts = int(cluster.job(job.id)["Restarts"])
    assert restarts >= 1 and [start.job_restarts for start in begun] == list(range(restarts + 1))
    assert {start.job_id for start in begun} == {job.id}
    assert [(start.code, start.reason) for start in begun[:-1]] == [
        (exit_codes.STOPPED_AFTER_SAVING, "stopped by SIGTERM")
    ] * restarts
    assert "was told to stop and has saved" in job.text() and "back into the queue, after 0 restarts" in job.text()
    assert "resumed" in (job.run_dir / "log.txt").read_text()
    local = commands.run(*arguments, "parallel.data=2", "run_dir=local", cwd=tmp_path)
    assert local.returncode == 0, local.stderr
    assert_same(job.outcome(), outcome(tmp_path / "local"))


def test_a_cancelled_job_saves_and_is_not_queued_again(cluster, train, stage_inputs):
    job = train(*sft(stage_inputs, *LONG), tasks=1, nodes=2)
    job.wait_for_step(2)
    cluster.run("scancel", job.id)
    assert job.wait() == "CANCELLED", job.text()
    assert cluster.job(job.id)["Restarts"] == "0"
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
