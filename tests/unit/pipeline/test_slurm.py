"""The sbatch commands of a chain, and the text of the scripts they submit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_align.config.job_size import num_nodes
from nemo_align.config.pipeline import ClusterConfig
from nemo_align.config.runtime import ParallelConfig
from nemo_align.pipeline import run, slurm
from nemo_align.pipeline.chain import Stage
from nemo_align.pipeline.manifest import read_manifest
from nemo_align.runtime import exit_codes, signal_lead

SCRIPTS = ("train.sbatch", "pipeline.sbatch")


def stage(tmp_path: Path, name: str = "dpo", depends_on: tuple[str, ...] = ()) -> Stage:
    return Stage(
        name=name,
        verb="preference",
        run_dir=tmp_path / name,
        arguments=("+experiment=x/dpo", f"run_dir={tmp_path}/{name}"),
        init_from=None,
        depends_on=depends_on,
    )


def test_a_job_waits_for_its_parents_and_dies_with_them(tmp_path):
    cluster = ClusterConfig(kind="slurm", partition="batch", account="me", time_limit="04:00:00")
    argv = slurm.submission(
        stage(tmp_path),
        ParallelConfig(tensor=8, pipeline=2, data=4),
        cluster,
        pipeline="x/recipe",
        after=["11", "12"],
        lead=600,
    )
    assert argv[0] == "sbatch"
    script = argv.index(str(slurm.script("train.sbatch")))
    assert argv[script + 1 :] == ["preference", "+experiment=x/dpo", f"run_dir={tmp_path}/dpo"]
    options = set(argv[1:script])
    assert {
        "--parsable",
        "--dependency=afterok:11:12",
        "--kill-on-invalid-dep=yes",
        "--job-name=x/recipe/dpo",
    } <= options
    assert {"--nodes=8", "--ntasks-per-node=8", "--gpus-per-node=8"} <= options
    assert {"--partition=batch", "--account=me", "--time=04:00:00"} <= options


def test_the_first_job_waits_for_nothing_and_a_cluster_without_gpus_is_asked_for_none(tmp_path):
    cluster = ClusterConfig(kind="slurm", gpus_per_node=None, tasks_per_node=2)
    argv = slurm.submission(
        stage(tmp_path), ParallelConfig(tensor=2, data=2), cluster, pipeline="r", after=[], lead=600
    )
    assert not any(option.startswith(("--dependency", "--kill-on", "--partition")) for option in argv)
    assert "--gpus-per-node=0" in argv  # over the script's own line
    assert {"--nodes=2", "--ntasks-per-node=2"} <= set(argv)


def test_a_container_reaches_the_job_through_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEMO_ALIGN_PYTHON", raising=False)
    monkeypatch.delenv("NEMO_ALIGN_SRUN_OPTIONS", raising=False)
    _commands(tmp_path, monkeypatch, 'echo "$NEMO_ALIGN_PYTHON|$NEMO_ALIGN_SRUN_OPTIONS"')
    assert slurm.submit(["sbatch"]).startswith(f"{sys.executable}|")  # bare: this Python, no options
    bare = ClusterConfig(kind="slurm", python="/shared/venv/bin/python")
    assert slurm.submit(["sbatch"], bare) == "/shared/venv/bin/python|"
    inside = ClusterConfig(kind="slurm", container_image="/images/a.sqsh", container_mounts=["/data:/data:ro"])
    mounts = f"--container-mounts={tmp_path}:{tmp_path},/data:/data:ro --container-workdir={tmp_path}"
    assert slurm.submit(["sbatch"], inside) == f"python|--container-image=/images/a.sqsh {mounts}"
    monkeypatch.setenv("NEMO_ALIGN_PYTHON", "/opt/python")  # what is set already wins
    assert slurm.submit(["sbatch"], inside).startswith("/opt/python|")


def test_the_lead_of_the_signal_reaches_slurm_and_the_run(tmp_path):
    argv = slurm.submission(stage(tmp_path), ParallelConfig(), ClusterConfig(), pipeline="r", after=[], lead=900)
    # On the command line, where it wins over a variable that the user happens to have.
    assert {"--signal=TERM@900", f"--export=ALL,{signal_lead.VARIABLE}=900"} <= set(argv)
    # The default of both sides is that of the script.
    text = slurm.script("train.sbatch").read_text()
    assert re.search(r"^#SBATCH --signal=TERM@(\d+)$", text, re.MULTILINE)[1] == "600"
    assert f"{signal_lead.VARIABLE}:-600" in text


def test_a_site_has_its_options(tmp_path):
    cluster = ClusterConfig(kind="slurm", partition="batch", account="me", qos="high")
    site = {"--partition=batch", "--account=me", "--qos=high"}
    assert site <= set(slurm.submission(stage(tmp_path), ParallelConfig(), cluster, pipeline="r", after=[], lead=600))
    assert site <= set(slurm.summary_submission(tmp_path, cluster, pipeline="r", after=["1"]))


@pytest.mark.parametrize(
    ("layout", "nodes", "expected"),
    [
        ({"tensor": 8, "pipeline": 12, "data": 16}, None, (192, 8)),
        ({"tensor": 2}, None, (1, 2)),  # less than a node
        ({"tensor": 8}, 16, (16, 8)),  # data parallel fills what is given
        ({"tensor": 8, "data": 2}, 16, (2, 8)),  # a fixed layout knows better
    ],
)
def test_nodes_follow_from_the_layout(layout, nodes, expected):
    assert num_nodes(ClusterConfig(nodes=nodes), ParallelConfig(**layout)) == expected


def test_a_layout_that_leaves_a_node_half_empty_is_refused():
    with pytest.raises(ValueError, match="12 workers do not fill nodes of 8"):
        num_nodes(ClusterConfig(), ParallelConfig(tensor=4, data=3))


def test_sbatch_that_refuses_is_quoted(tmp_path, monkeypatch):
    _commands(tmp_path, monkeypatch, "echo 'invalid partition specified: nope' >&2; exit 1")
    with pytest.raises(ValueError, match=r"sbatch refused the job: invalid partition specified: nope"):
        slurm.submit(["sbatch", "--partition=nope"])


def test_without_slurm_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sbatch is not installed here"):
        slurm.submit(["sbatch"])


def test_a_chain_is_submitted_with_its_dependencies_and_not_twice(tmp_path, monkeypatch, capsys):
    from nemo_align.config.compose import compose

    for name in ("tokenizer.model", "rows.jsonl"):
        (tmp_path / name).write_text("")
    keys = [f"data.tokenizer={tmp_path}/tokenizer.model", f"data.train.a.path={tmp_path}/rows.jsonl"]
    keys += ["data.sequence_length=64", "train.global_batch_size=8", "train.max_steps=2", "optimizer.lr=1e-4"]
    texts = [f"run_dir={tmp_path}/run", f"overrides=[{','.join(map(repr, keys))}]", "cluster=slurm"]
    texts += ["stages.base.verb=sft", "stages.base.overrides=['model=tiny']"]
    for name, source in ("left", "base"), ("right", "base"), ("end", "left"):
        texts += [f"stages.{name}.verb=sft", f"stages.{name}.init_from={source}"]
    # An sbatch that only numbers its jobs: what SLURM makes of them needs a real cluster.
    _commands(tmp_path, monkeypatch, f'echo "$*" >> {tmp_path}/calls; wc -l < {tmp_path}/calls', squeue="echo PENDING")

    assert run.main(compose("pipeline", texts), texts) == 0

    calls = (tmp_path / "calls").read_text().splitlines()
    dependencies = [match[0] if (match := re.findall(r"--dependency=(\S+)", call)) else None for call in calls]
    assert dependencies == [None, "afterok:1", "afterok:1", "afterok:2", "afterany:1:2:3:4"]
    assert calls[4].endswith(f"-m nemo_align.pipeline {tmp_path}/run")
    assert [record.job_id for record in read_manifest(tmp_path / "run").stages] == ["1", "2", "3", "4"]
    assert "cancel all: scancel 1 2 3 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"still queued or running: base \(job 1\)"):
        run.main(compose("pipeline", texts), texts)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name):
    path = slurm.script(name)
    text = path.read_text()
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert os.access(path, os.X_OK)
    lines = text.splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])  # SLURM reads them up to a command
    assert not re.search(r"^#SBATCH +--(partition|account|qos|nodelist|reservation|time)\b", text, re.MULTILINE)
    assert not re.search(r"/(home|lustre|scratch|fsx|mnt)/", text)
    for line in re.findall(r"^export .*$", text, re.MULTILINE) if name == "train.sbatch" else ():
        before = text[: text.index(line)].rstrip("\n").splitlines()[-1]
        assert before.startswith("#"), f"{line} lacks its why"


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_only_a_saved_run_goes_back_into_the_queue(tmp_path, monkeypatch, code, requeued):
    _commands(tmp_path, monkeypatch, "", srun=f"exit {code}", scontrol=f'echo "$*" > {tmp_path}/requeued', sleep="")
    variables = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "dgx[1-2]"}
    done = subprocess.run(["bash", str(slurm.script("train.sbatch")), "sft", "a=b"], env=variables, check=False)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_cancelled_job_is_not_queued_again_though_it_has_saved(tmp_path, monkeypatch, name, capfd):
    # The state that SLURM shows while it ends a job; SIGNALING is that of a job that was only told to stop.
    for state in "COMPLETING", "SIGNALING":
        (tmp_path / state).mkdir()
        with monkeypatch.context() as patched:
            scontrol, squeue = f'echo "$*" > {tmp_path}/{state}/requeued', f"echo {state}"
            _commands(
                tmp_path / state,
                patched,
                "",
                srun="exit 75",
                python="exit 75",
                scontrol=scontrol,
                squeue=squeue,
                sleep="",
            )
            patched.chdir(tmp_path)
            variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "dgx[1-2]"}
            variables |= {"NEMO_ALIGN_PYTHON": str(tmp_path / state / "bin" / "python")}
            script = str(slurm.script(name))
            done = subprocess.run(["bash", script, "sft"], env={**os.environ, **variables}, check=False)
        assert done.returncode == exit_codes.STOPPED_AFTER_SAVING
        assert (tmp_path / state / "requeued").exists() == (state == "SIGNALING")
    assert "it is being ended from outside (COMPLETING), so it is not queued again" in capfd.readouterr().out


@pytest.mark.parametrize(("starts", "requeued"), [("0", True), ("9", True), ("10", False)])
def test_a_hung_run_goes_back_into_the_queue_a_bounded_number_of_times(tmp_path, monkeypatch, capfd, starts, requeued):
    # srun's own code is that of the task that had to be killed.
    srun = 'echo "no answer from rank 3 (host dgx2, pid 9)" >> "$NEMO_ALIGN_HANG_NOTE"; exit 137'
    _commands(tmp_path, monkeypatch, "", srun=srun, scontrol=f'echo "$*" > {tmp_path}/requeued', sleep="")
    monkeypatch.chdir(tmp_path)
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "dgx[1-2]", "SLURM_RESTART_COUNT": starts}
    script = str(slurm.script("train.sbatch"))
    done = subprocess.run(["bash", script, "sft"], env={**os.environ, **variables}, check=False)
    assert done.returncode == exit_codes.HUNG
    assert (tmp_path / "requeued").exists() == requeued
    said = capfd.readouterr().out
    assert "no answer from rank 3 (host dgx2, pid 9)" in said
    restarts = f"9:59 before its time limit: back into the queue, after {starts} restarts"
    assert f"job 7 made no progress, {restarts}" in said if requeued else f"again {starts} times already" in said
    assert not list(tmp_path.glob(".nemo_align_hang*"))


@pytest.mark.parametrize(
    ("code", "starts", "requeued"), [(75, "99", True), (76, "3", True), (76, "10", False), (1, "0", False)]
)
def test_a_pipeline_that_stopped_or_hung_goes_back_into_the_queue(tmp_path, monkeypatch, code, starts, requeued):
    _commands(tmp_path, monkeypatch, "", python=f"exit {code}", scontrol=f'echo "$*" > {tmp_path}/requeued', sleep="")
    variables = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": starts, "NEMO_ALIGN_PYTHON": str(tmp_path / "bin/python")}
    script = str(slurm.script("pipeline.sbatch"))
    done = subprocess.run(["bash", script], env={**os.environ, **variables}, check=False)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == requeued


def _commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str, **others: str) -> None:
    """Put small stand-ins of SLURM's commands first in PATH: of a job that runs, with ten minutes left."""
    folder = tmp_path / "bin"
    folder.mkdir()
    squeue = 'case "$*" in *%L*) echo 9:59 ;; *) echo RUNNING ;; esac'
    for name, body in {"sbatch": sbatch, "squeue": squeue, **others}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
