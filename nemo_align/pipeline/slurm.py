"""Stages as dependent SLURM jobs, submitted through slurm/train.sbatch."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_align.config.job_size import num_nodes
from nemo_align.config.pipeline import ClusterConfig
from nemo_align.pipeline.chain import Stage
from nemo_align.runtime import signal_lead

TRAIN_SCRIPT = "train.sbatch"


def script(name: str) -> Path:
    """A batch script: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "slurm" / name
    path = inside if inside.is_file() else package.parent / "slurm" / name
    if not path.is_file():
        raise ValueError(f"{path} does not exist: start from a checkout, or reinstall the package")
    return path


def submission(
    stage: Stage,
    parallel: Any,
    cluster: ClusterConfig,
    *,
    pipeline: str,
    after: list[str],
    lead: int,
) -> list[str]:
    """The sbatch command of a stage that starts once the jobs `after` have ended well, and is told to stop `lead`
    seconds before its time limit."""
    nodes, tasks = num_nodes(cluster, parallel)
    options = [
        "--parsable",  # only the job id on stdout
        f"--job-name={pipeline}/{stage.name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={tasks}",
        f"--output={stage.run_dir}/slurm-%j.txt",
        "--open-mode=append",  # a requeued job keeps its id: go on in the same file
    ]
    # 0 takes back the script's own line on a cluster without GPUs.
    options.append(f"--gpus-per-node={min(tasks, cluster.gpus_per_node or 0)}")
    options += _site_options(cluster)
    if cluster.time_limit is not None:
        options.append(f"--time={cluster.time_limit}")
    options.append(f"--signal=TERM@{lead}")  # to the tasks: no "B:"
    options.append(f"--export=ALL,{signal_lead.VARIABLE}={lead}")  # so that the run can say if it needs more
    if after:
        # Without the second option a job whose parent failed stays in the queue for ever.
        options += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
    return ["sbatch", *options, str(script(TRAIN_SCRIPT)), stage.verb, *stage.arguments]


def summary_submission(run_dir: Path, cluster: ClusterConfig, *, pipeline: str, after: list[str]) -> list[str]:
    """The sbatch command of the job that brings manifest and report up to date, however the stages ended."""
    options = ["--parsable", f"--job-name={pipeline}/summary", "--nodes=1", "--ntasks=1", "--time=00:10:00"]
    options += [f"--output={run_dir}/slurm-summary.txt", f"--dependency=afterany:{':'.join(after)}"]
    options += _site_options(cluster)
    return ["sbatch", *options, f"--wrap={shlex.join([sys.executable, '-m', 'nemo_align.pipeline', str(run_dir)])}"]


def assigned(variable: str, argv: list[str]) -> str:
    """An sbatch command as a line for a shell, which puts the job's id into `variable`. Ids of earlier jobs, as `id_in`
    writes them, are filled in by the shell."""
    return f"{variable}=$({' '.join(map(_for_shell, argv))})"


def id_in(variable: str) -> str:
    """The job id in a shell's variable: sbatch --parsable says "<id>" or "<id>;<cluster>"."""
    return f"${{{variable}%;*}}"


def _for_shell(text: str) -> str:
    return f'"{text}"' if text.startswith("--dependency=") else shlex.quote(text)


def variables(cluster: ClusterConfig) -> dict[str, str]:
    """What slurm/train.sbatch is told in environment variables: the Python of the nodes, and srun's options for a
    container. A variable that is set already wins."""
    told = {"NEMO_ALIGN_PYTHON": cluster.python or ("python" if cluster.container_image else sys.executable)}
    if cluster.container_image is not None:
        here = Path.cwd()  # relative paths of the configuration start here, inside as outside
        mounts = ",".join([f"{here}:{here}", *cluster.container_mounts])
        told["NEMO_ALIGN_SRUN_OPTIONS"] = (
            f"--container-image={cluster.container_image} --container-mounts={mounts} --container-workdir={here}"
        )
    return {name: os.environ.get(name, value) for name, value in told.items()}


def _site_options(cluster: ClusterConfig) -> list[str]:
    values = (("partition", cluster.partition), ("account", cluster.account), ("qos", cluster.qos))
    return [*(f"--{name}={value}" for name, value in values if value is not None), *cluster.sbatch_options]


def submit(argv: list[str], cluster: ClusterConfig | None = None) -> str:
    """Run an sbatch command; returns the job id. Raises ValueError with what sbatch said if it refuses."""
    environment = {**os.environ, **variables(cluster or ClusterConfig())}  # the job inherits it
    try:
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ValueError("sbatch is not installed here: run on a login node, or use cluster=local") from None
    if done.returncode:
        raise ValueError(f"sbatch refused the job: {done.stderr.strip()}\n  {shlex.join(argv)}")
    return done.stdout.strip().split(";")[0]  # "<id>" or "<id>;<cluster>"


def queued(job_id: str) -> bool:
    """Whether SLURM still has the job to run or running."""
    # Of its own accord squeue lists only jobs that have not ended; one that it has forgotten is an error.
    done = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job_id}", "--format=%T"], capture_output=True, text=True, check=False
    )
    return done.returncode == 0 and bool(done.stdout.strip())


@dataclass(frozen=True)
class Job:
    """A stage's job, for the table of a submission."""

    id: str
    nodes: int
    after: list[str]  # names of the stages whose jobs it waits for


def table(jobs: Mapping[str, Job]) -> str:
    """The job of each stage, what it waits for, and how to look at them and end them all."""
    rows = [("stage", "job", "nodes", "after")]
    rows += [(name, job.id, str(job.nodes), ", ".join(job.after) or "-") for name, job in jobs.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    ids = [job.id for job in jobs.values()]
    look, cancel = f"look: squeue --jobs={','.join(ids)}", f"cancel all: scancel {' '.join(ids)}"
    return "\n".join(["submitted:", *(f"  {line}" for line in lines), look, cancel])
