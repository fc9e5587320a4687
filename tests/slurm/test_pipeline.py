"""`nemo-align pipeline cluster=slurm`: stages as jobs that wait for each other, on a cluster that is there."""

import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_align.runtime import exit_codes, starts
from nemo_align.training.metrics import read_metrics
from tests.distributed.checkpoint_runs import assert_equal
from tests.end_to_end import commands
from tests.slurm.conftest import JOB_SECONDS, outcome, wait_for_step
from tests.stage_inputs import MODEL, stage_overrides

pytestmark = pytest.mark.full

CLUSTER = ["cluster=slurm", "cluster.gpus_per_node=null", "cluster.tasks_per_node=1"]
# Long enough to be met while it trains.
LONG = ["train.max_steps=60", "checkpoint.save_every=50"]
# The stages whose jobs each stage of quickstart/short waits for: those whose weights or rows it reads.
READS = {
    "pretrain": [],
    "continued_pretrain": ["pretrain"],
    "code_sft": ["continued_pretrain"],
    "general_sft": ["code_sft"],
    "reward": ["continued_pretrain"],
    "score_code": ["reward"],
    "dpo": ["general_sft", "score_code"],
    "rpo_1": ["score_code", "dpo"],
    "rpo_2": ["score_code", "rpo_1"],
    "rpo_3": ["score_code", "rpo_2"],
}
AFTER_CODE_SFT = ["general_sft", "dpo", "rpo_1", "rpo_2", "rpo_3"]
CHAIN_SECONDS = 900.0  # ten stages beside the same ten without SLURM, on two cores that may have other work


class Chain:
    """A pipeline in a folder of its own, `texts` its stages."""

    def __init__(self, cluster, folder: Path, texts: list[str]) -> None:
        self.cluster = cluster
        self.folder = folder
        self.texts = ["run_dir=run", *CLUSTER, *texts]

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

    def waits_for(self, job_id: str) -> dict[str, str]:
        """Job ids that a job still waits for, with the kind of the dependency: afterok, afterany."""
        dependency = self.cluster.job(job_id)["Dependency"]
        return {source: kind for kind, source in re.findall(r"(\w+):(\d+)", dependency)}

    def states(self, jobs: dict[str, str], seconds: float = JOB_SECONDS) -> dict[str, str]:
        """The states in which the jobs end."""
        return dict(zip(jobs, self.cluster.wait_for_end(*jobs.values(), seconds=seconds), strict=True))

    def records(self) -> dict[str, dict]:
        return records_of(self.folder / "run")

    def summary(self) -> str:
        return (self.folder / "run" / "slurm-summary.txt").read_text()


def records_of(run_dir: Path) -> dict[str, dict]:
    """The manifest's stages, by name."""
    manifest = json.loads((run_dir / "manifest.json").read_text())
    return {record["name"]: record for record in manifest["stages"]}


def sft_stages(inputs, *, first: list[str], names: tuple[str, ...] = ("first", "second", "third")) -> list[str]:
    """Arguments of SFT stages, each from the one before; `first`: overrides of the first."""
    own, texts = stage_overrides(inputs, "sft"), []
    for source, name in zip((None, *names), names, strict=False):
        overrides = [*own, "precision=fp32"] if source else [*MODEL, *own, *first]
        listed = ",".join(f'"{text}"' for text in overrides)
        texts += [f"stages.{name}.verb=sft", f"stages.{name}.overrides=[{listed}]"]
        texts += [f"stages.{name}.init_from={source}"] if source else []
    return texts


def test_a_cancelled_stage_takes_its_dependents_along_and_the_same_command_goes_on(cluster, stage_inputs, tmp_path):
    chain = Chain(cluster, tmp_path, sft_stages(stage_inputs, first=LONG))
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
    chain = Chain(cluster, tmp_path, sft_stages(stage_inputs, first=["optimizer.lr=1e30"]))
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


def test_the_quickstart_through_dependencies_equals_a_run_without_slurm(cluster, quickstart_data, tmp_path):
    """All ten stages on the real data, each over both nodes. Code SFT is told to stop and queued again meanwhile: the
    stages that it leads to wait, and nothing of it is seen in the numbers."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "quickstart").symlink_to(quickstart_data)
    recipe = "+experiment=quickstart/short"
    chain = Chain(cluster, tmp_path, [recipe])
    with ThreadPoolExecutor() as pool:
        jobs = chain.submit()
        local = pool.submit(commands.run, "pipeline", recipe, "run_dir=local", cwd=tmp_path, timeout=CHAIN_SECONDS)
        assert list(jobs) == [*READS, "summary"]
        for name, sources in READS.items():
            assert chain.waits_for(jobs[name]) == {jobs[source]: "afterok" for source in sources}, name
        assert chain.waits_for(jobs["summary"]) == {jobs[name]: "afterany" for name in READS}
        wait_for_step(cluster, tmp_path / "run" / "code_sft", 1, CHAIN_SECONDS)
        cluster.run("scancel", "--signal=TERM", jobs["code_sft"])
        wait_until_queued_again(cluster, jobs["code_sft"])
        assert {cluster.state(jobs[name]) for name in AFTER_CODE_SFT} == {"PENDING"}
        assert chain.waits_for(jobs["general_sft"]) == {jobs["code_sft"]: "afterok"}
        cluster.start_soon(jobs["code_sft"])
        assert chain.states(jobs, CHAIN_SECONDS) == dict.fromkeys(jobs, "COMPLETED")
        assert local.result().returncode == 0, local.result().stderr[-4000:]

    records = chain.records()
    assert {name: record["status"] for name, record in records.items()} == dict.fromkeys(READS, "complete")
    assert {name: record["restarts"] for name, record in records.items()} == dict.fromkeys(READS, 0) | {"code_sft": 1}
    assert {record["nodes"] for record in records.values()} == {"127.0.0.[1-2]"}
    stopped, resumed = starts.read(tmp_path / "run" / "code_sft")
    assert (stopped.code, stopped.reason) == (exit_codes.STOPPED_AFTER_SAVING, "stopped by SIGTERM")
    assert (resumed.job_id, resumed.job_restarts, resumed.reason) == (jobs["code_sft"], 1, "complete")
    for name, record in records.items():
        assert record["job_id"] == jobs[name]
        log = (tmp_path / "run" / name / f"slurm-{jobs[name]}.txt").read_text()
        assert f"job {jobs[name]} start 0 of it, nodes 127.0.0.[1-2]: nemo-align {record['verb']} " in log
        assert ("has saved" in log) == (name == "code_sft")
    report = (tmp_path / "run" / "report.html").read_text()
    assert all(name in report and re.search(rf"^{name} .* complete ", chain.summary(), re.MULTILINE) for name in READS)
    assert records["dpo"]["metrics"]["first"]["validation/tasks/preference_loss"] == pytest.approx(0.693147, abs=1e-5)
    for name in ("reward", "rpo_3"):
        assert (tmp_path / records[name]["hf"] / "config.json").is_file()

    alone = records_of(tmp_path / "local")
    for name, record in records.items():
        assert_same_stage(tmp_path / "run" / name, tmp_path / "local" / name, record["verb"])
        assert record["metrics"] == alone[name]["metrics"]


def wait_until_queued_again(cluster, job_id: str) -> None:
    def queued_again() -> bool:
        job = cluster.job(job_id)
        return job["Restarts"] == "1" and job["JobState"] == "PENDING"

    cluster.wait(queued_again, f"job {job_id} to be queued again", seconds=JOB_SECONDS)


def assert_same_stage(found: Path, expected: Path, verb: str) -> None:
    """Every number of a stage, to the last bit: its steps, its held-out metrics, its weights; the rows it scored."""
    if verb == "score":
        names = {path.name for path in expected.glob("*.jsonl")} - {"metrics.jsonl", "starts.jsonl"}
        assert len(names) == 2
        assert all((found / name).read_bytes() == (expected / name).read_bytes() for name in names)
        return
    steps, held_out, weights = outcome(found)
    expected_steps, expected_held_out, expected_weights = outcome(expected)
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert (steps, held_out) == (expected_steps, expected_held_out), found.name
    assert_equal(weights, expected_weights)


def test_a_chain_in_one_job_goes_on_at_the_stage_that_was_told_to_stop(cluster, stage_inputs, tmp_path):
    """slurm/pipeline.sbatch: the signal comes to the batch script alone."""
    site = ["--gpus-per-node=0", "--mem=100", "--output=slurm-%j.txt"]
    script = commands.ROOT / "slurm" / "pipeline.sbatch"
    stages = sft_stages(stage_inputs, first=LONG, names=("first", "second"))
    job_id = cluster.run("sbatch", "--parsable", *site, script, "run_dir=run", *stages, cwd=tmp_path)
    wait_for_step(cluster, tmp_path / "run" / "first", 2)
    cluster.run("scancel", "--batch", "--signal=TERM", job_id)
    wait_until_queued_again(cluster, job_id)
    cluster.start_soon(job_id)
    output = tmp_path / f"slurm-{job_id}.txt"
    assert cluster.wait_for_end(job_id, seconds=JOB_SECONDS) == ["COMPLETED"], output.read_text()

    said = output.read_text()
    assert re.search(rf"job {job_id} was told to stop and has saved, .*: back into the queue, after 0 restarts", said)
    assert f"job {job_id} start 1 of it, nodes 127.0.0." in said
    records = records_of(tmp_path / "run")
    ends = {name: (record["status"], record["restarts"]) for name, record in records.items()}
    assert ends == {"first": ("complete", 1), "second": ("complete", 0)}
    begun = starts.read(tmp_path / "run" / "first")
    assert [(start.job_id, start.job_restarts) for start in begun] == [(job_id, 0), (job_id, 1)]
    trained = [record["step"] for record in read_metrics(tmp_path / "run" / "first") if record["kind"] == "train"]
    assert trained == list(range(1, 61))
