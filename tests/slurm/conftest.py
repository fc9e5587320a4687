"""The cluster of all tests in this folder, and jobs on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_align.training.metrics import read_metrics
from tests.distributed.checkpoint_runs import weights_of
from tests.distributed.stage_runs import numbers
from tests.end_to_end import commands
from tests.slurm.cluster import NODES, Cluster, missing_daemons

TRAIN = commands.ROOT / "slurm" / "train.sbatch"
QUICKSTART = commands.ROOT / "data" / "quickstart"
# Room for a machine of two cores that has other work.
JOB_SECONDS = 240.0


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes; nothing of them is left afterwards."""
    if missing := missing_daemons():
        pytest.skip(f"{', '.join(missing)} not installed: make test-slurm, as root on Debian, installs them")
    cluster = Cluster()
    cluster.environment |= commands.environment()  # the path to the checkout; one thread per worker
    cluster.environment |= {"PATH": cluster.path, "NEMO_ALIGN_PYTHON": commands.command()[0]}
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
    assert not cluster.processes(), "processes of the cluster are left"
    assert not cluster.folder.exists()


@pytest.fixture(scope="session")
def quickstart_data() -> Path:
    """The data of the quickstart, which `make test-slurm` writes."""
    if not (QUICKSTART / "manifest.json").is_file():
        pytest.skip(f"{QUICKSTART} is not there: make quickstart-data writes it")
    return QUICKSTART


@dataclass
class Job:
    """A run that SLURM starts."""

    cluster: Cluster
    id: str
    run_dir: Path
    output: Path

    def outcome(self) -> tuple[list[dict], list[dict], dict]:
        """Training metrics, held-out metrics and final weights."""
        return outcome(self.run_dir)

    def wait(self, seconds: float = JOB_SECONDS) -> str:
        """The state in which the job ends."""
        (state,) = self.cluster.wait_for_end(self.id, seconds=seconds)
        return state

    def wait_for_step(self, step: int, seconds: float = JOB_SECONDS) -> None:
        wait_for_step(self.cluster, self.run_dir, step, seconds)

    def tasks(self) -> list[int]:
        """Its ranks, by process number."""
        return self.cluster.processes(f"SLURM_JOB_ID={self.id}", "SLURM_STEP_ID=0")

    def set_time_limit(self, minutes_left: int) -> None:
        """Change the limit of the job, which may be running."""
        hours, minutes, _ = map(int, self.cluster.job(self.id)["RunTime"].split(":"))
        limit = 60 * hours + minutes + 1 + minutes_left
        self.cluster.run("scontrol", "update", f"JobId={self.id}", f"TimeLimit={limit}")

    def text(self) -> str:
        """What the batch script and the tasks wrote."""
        return self.output.read_text() if self.output.exists() else ""


@pytest.fixture
def train(cluster: Cluster, tmp_path: Path) -> Callable[..., Job]:
    """Submit slurm/train.sbatch: `train("sft", overrides, tasks=2, options=["--time=3"])`; `tasks` per node."""

    def submit(*arguments: str, tasks: int, nodes: int = len(NODES), options: list[str] | None = None) -> Job:
        # A cluster without GPUs, whose nodes several jobs share.
        site = ["--gpus-per-node=0", "--mem=100", "--oversubscribe", f"--nodes={nodes}", f"--ntasks-per-node={tasks}"]
        argv = ["sbatch", "--parsable", *site, "--output=slurm-%j.txt", *(options or []), TRAIN, *arguments]
        job_id = cluster.run(*argv, "run_dir=run", cwd=tmp_path)
        return Job(cluster, job_id, tmp_path / "run", tmp_path / f"slurm-{job_id}.txt")

    return submit


def wait_for_step(cluster: Cluster, run_dir: Path, step: int, seconds: float = JOB_SECONDS) -> None:
    """Wait until a run has logged `step`."""
    cluster.wait(
        lambda: any(record["kind"] == "train" and record["step"] >= step for record in read_metrics(run_dir)),
        f"step {step} of {run_dir}",
        seconds=seconds,
    )


def outcome(run_dir: Path) -> tuple[list[dict], list[dict], dict]:
    """Training metrics, held-out metrics and final weights with Adam's moments: all that must not depend on SLURM."""
    records = read_metrics(run_dir)
    result = json.loads((run_dir / "result.json").read_text())
    weights = weights_of(run_dir / result["output"], optimizer=True)
    return numbers(records, "train"), numbers(records, "validation"), weights
