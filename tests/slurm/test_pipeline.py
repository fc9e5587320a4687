"""`nemo-align pipeline cluster=slurm`: stages as jobs that wait for each other, on a cluster that is there."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from nemo_align.runtime import exit_codes
from nemo_align.training.metrics import read_metrics
from tests.end_to_end import commands
from tests.slurm.conftest import JOB_SECONDS, wait_for_step
from tests.stage_inputs import MODEL, stage_overrides

pytestmark = pytest.mark.full

CLUSTER = ["cluster=slurm", "cluster.gpus_per_node=null", "cluster.tasks_per_node=1"]


class Chain:
    """A pipeline of small stages in a folder of its own."""

    def __init__(self, cluster, folder: Path, stages: dict[str, tuple[str, str | None, list[str]]]) -> None:
        self.cluster = cluster
        self.folder = folder
        self.texts = ["run_dir=run", *CLUSTER]
        for name, (verb, source, overrides) in stages.items():
            listed = ",".join(f'"{text}"' for text in overrides)
            self.texts += [f"stages.{name}.verb={verb}", f"stages.{name}.overrides=[{listed}]"]
            self.texts += [f"stages.{name}.init_from={source}"] if source else []

    def submit(self) -> dict[str, str]:
        """Job ids of the stages and of the summary, from the table that the command prints."""
        table = self.cluster.run(*commands.command("pipeline", *self.texts), cwd=self.folder, timeout=120)
        jobs = dict(re.findall(r"^  (\w+) +(\d+) ", table, re.MULTILINE))
        assert f"cancel all: scancel {' '.join(jobs.values())}" in table
        return jobs

    def refused(self) -> str:
        """What the command says when it does not start."""
        argv = commands.command("pipeline", *self.texts)
        done = subprocess.run(argv, env=self.cluster.environment, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == exit_codes.USER_ERROR, done.stderr
        return done.stderr

    def states(self, jobs: dict[str, str], seconds: float = JOB_SECONDS) -> dict[str, str]:
        """The states in which the jobs end."""
        return dict(zip(jobs, self.cluster.wait_for_end(*jobs.values(), seconds=seconds), strict=True))

    def records(self) -> dict[str, dict]:
        """The manifest's stages, by name."""
        manifest = json.loads((self.folder / "run" / "manifest.json").read_text())
        return {record["name"]: record for record in manifest["stages"]}

    def summary(self) -> str:
        return (self.folder / "run" / "slurm-summary.txt").read_text()


def sft_chain(cluster, folder: Path, inputs, *, first: list[str]) -> Chain:
    """Two SFT stages, one after the other, and one that only the first matters to."""
    own = stage_overrides(inputs, "sft")
    return Chain(
        cluster,
        folder,
        {
            "first": ("sft", None, [*MODEL, *own, *first]),
            "second": ("sft", "first", [*own, "precision=fp32"]),
            "third": ("sft", "second", [*own, "precision=fp32"]),
        },
    )


def test_a_cancelled_stage_takes_its_dependents_along_and_the_same_command_goes_on(cluster, stage_inputs, tmp_path):
    chain = sft_chain(cluster, tmp_path, stage_inputs, first=["train.max_steps=60", "checkpoint.save_every=50"])
    jobs = chain.submit()
    wait_for_step(cluster, tmp_path / "run" / "first", 2)
    assert f"still queued or running: first (job {jobs['first']})" in chain.refused()
    cluster.run("scancel", jobs["first"])
    states = {"first": "CANCELLED", "second": "CANCELLED", "third": "CANCELLED", "summary": "COMPLETED"}
    assert chain.states(jobs) == states
    records = chain.records()
    assert {name: record["status"] for name, record in records.items()} == dict.fromkeys(records, "cancelled")
    assert records["first"]["reason"] == "cancelled in SLURM" and records["first"]["nodes"] == "127.0.0.1"
    assert records["second"]["reason"] == "a stage that it reads did not end well"

    again = chain.submit()
    assert set(chain.states(again).values()) == {"COMPLETED"}
    records = chain.records()
    assert {record["status"] for record in records.values()} == {"complete"}
    assert {name: record["restarts"] for name, record in records.items()} == {"first": 1, "second": 0, "third": 0}
    assert "resumed run/first/checkpoints/step_" in (tmp_path / "run" / "first" / "log.txt").read_text()
    trained = [record["step"] for record in read_metrics(tmp_path / "run" / "first") if record["kind"] == "train"]
    assert trained == list(range(1, 61))


def test_a_failing_stage_stops_the_chain_with_its_reason(cluster, stage_inputs, tmp_path):
    # A learning rate at which nothing stays finite: found by the run itself, after it has begun.
    chain = sft_chain(cluster, tmp_path, stage_inputs, first=["optimizer.lr=1e30"])
    jobs = chain.submit()
    states = {"first": "FAILED", "second": "CANCELLED", "third": "CANCELLED", "summary": "COMPLETED"}
    assert chain.states(jobs) == states
    assert cluster.job(jobs["first"])["ExitCode"] == f"{exit_codes.USER_ERROR}:0"
    first, second, third = chain.records().values()
    assert (first["status"], first["exit_code"]) == ("failed", exit_codes.USER_ERROR)
    assert "stopped before the update; the last checkpoint is good" in first["reason"]
    assert (second["status"], third["status"]) == ("cancelled", "cancelled")
    assert f"first failed (job {jobs['first']}, nodes 127.0.0.1, exit code 2): step " in chain.summary()
    text = (tmp_path / "run" / "first" / f"slurm-{jobs['first']}.txt").read_text()
    assert first["reason"].splitlines()[0] in text


def test_every_stage_of_a_recipe_through_dependencies(cluster, stage_inputs, tmp_path):
    """Pretraining to DPO on scored pairs; the SFT stage is told to stop and queued again, and DPO waits for it."""
    own = {verb: stage_overrides(stage_inputs, verb) for verb in ("pretrain", "sft", "reward", "preference")}
    scored = [f"data.{split}.rows.path={{score}}/{split}.jsonl" for split in ("train", "validation")]
    inputs = [f"inputs.train={stage_inputs.rows('pairs')}", f"inputs.validation={stage_inputs.rows('pairs_held_out')}"]
    chain = Chain(
        cluster,
        tmp_path,
        {
            "pretrain": ("pretrain", None, [*MODEL, *own["pretrain"], "parallel.data=2"]),
            "sft": ("sft", "pretrain", [*own["sft"], "precision=fp32", "train.max_steps=40"]),
            "reward": ("reward", "pretrain", [*own["reward"], "precision=fp32", "parallel.tensor=2"]),
            "score": ("score", "reward", [*inputs, "precision=fp32", "data.sequence_length=96"]),
            "dpo": ("preference", "sft", [*own["preference"], *scored, "data.select.inverted=swap", "precision=fp32"]),
        },
    )
    jobs = chain.submit()
    wait_for_step(cluster, tmp_path / "run" / "sft", 2)
    cluster.run("scancel", "--signal=TERM", jobs["sft"])

    def queued_again() -> bool:
        job = cluster.job(jobs["sft"])
        return job["Restarts"] == "1" and job["JobState"] == "PENDING"

    cluster.wait(queued_again, "the SFT job to be queued again")
    assert cluster.state(jobs["dpo"]) == "PENDING"
    cluster.start_soon(jobs["sft"])
    assert chain.states(jobs) == dict.fromkeys(jobs, "COMPLETED")

    records = chain.records()
    assert {record["status"] for record in records.values()} == {"complete"}
    restarts = {name: record["restarts"] for name, record in records.items()}
    assert restarts == {"pretrain": 0, "sft": 1, "reward": 0, "score": 0, "dpo": 0}
    nodes = {name: record["nodes"] for name, record in records.items()}
    assert nodes["pretrain"] == nodes["reward"] == "127.0.0.[1-2]"
    assert {nodes[name] for name in ("sft", "score", "dpo")} <= {"127.0.0.1", "127.0.0.2"}
    assert records["dpo"]["metrics"]["first"]["validation/rows/preference_loss"] == pytest.approx(0.693147, abs=1e-5)
    for name, job_id in jobs.items():
        if name != "summary":
            assert (tmp_path / "run" / name / f"slurm-{job_id}.txt").stat().st_size
    assert "dpo" in chain.summary() and "complete" in chain.summary()
