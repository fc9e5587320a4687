"""The sbatch commands of a chain, and the text of the scripts they submit."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_align.config.compose import compose
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


def _chain(tmp_path: Path, *links: tuple[str, str | None]) -> list[str]:
    """Command line of a chain on SLURM: stages with the stage that each starts from."""
    for name in ("tokenizer.model", "rows.jsonl"):
        (tmp_path / name).write_text("")
    keys = [f"data.tokenizer={tmp_path}/tokenizer.model", f"data.train.a.path={tmp_path}/rows.jsonl"]
    keys += ["data.sequence_length=64", "train.global_batch_size=8", "train.max_steps=2", "optimizer.lr=1e-4"]
    texts = [f"run_dir={tmp_path}/run", f"overrides=[{','.join(map(repr, keys))}]", "cluster=slurm"]
    for name, source in links:
        start = "overrides=['model=tiny']" if source is None else f"init_from={source}"
        texts += [f"stages.{name}.verb=sft", f"stages.{name}.{start}"]
    return texts


def test_a_chain_is_submitted_with_its_dependencies_and_not_twice(tmp_path, monkeypatch, capsys):
    texts = _chain(tmp_path, ("base", None), ("left", "base"), ("right", "base"), ("end", "left"))
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


def test_the_commands_of_a_dry_run_are_the_submission(tmp_path, monkeypatch, capsys):
    texts = _chain(tmp_path, ("base", None), ("on-it", "base"), ("on_it", "base"), ("last", "on_it"))
    texts += ['run_dir="its (here)/run"', "stages.last.overrides=['data.train.b.path={on-it}/../../../rows.jsonl']"]
    monkeypatch.chdir(tmp_path)
    # Ids as of a federation of clusters; an output file that cannot be opened is an error.
    stub = (
        'for text; do case $text in --output=*) touch "${text#--output=}" || exit 1 ;; esac; done\n'
        f'printf "%s|" "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls; echo "$(wc -l < {tmp_path}/calls);dgx"'
    )
    _commands(tmp_path, monkeypatch, stub)
    monkeypatch.setattr(run.dry_runs, "run", lambda *_: exit_codes.SUCCESS)  # tests/unit/dry_run/ has its own tests
    assert run.main(compose("pipeline", [*texts, "dry_run=true"])) == 0
    printed = capsys.readouterr().out
    assert '"--dependency=afterok:${job_base%;*}"' in printed and not (tmp_path / "its (here)").exists()
    subprocess.run(["bash", "-euc", printed], check=True)
    pasted = (tmp_path / "calls").read_text().splitlines()
    (tmp_path / "calls").unlink()

    assert run.main(compose("pipeline", texts)) == 0
    submitted = (tmp_path / "calls").read_text().splitlines()
    assert pasted == submitted[:4]  # the last job writes the manifest, which the submission has begun
    assert [re.findall(r"--dependency=afterok:([\d:]+)\|", call) for call in pasted] == [[], ["1"], ["1"], ["2:3"]]


@pytest.mark.parametrize("taken", [0, 2])
def test_a_refused_submission_leaves_behind_only_what_slurm_has_taken(tmp_path, monkeypatch, taken):
    texts = _chain(tmp_path, ("base", None), ("left", "base"), ("end", "left"))
    (tmp_path / "calls").touch()
    stub = f'echo >> {tmp_path}/calls; n=$(wc -l < {tmp_path}/calls); [ "$n" -le {taken} ] && echo "$n" && exit 0\n'
    _commands(tmp_path, monkeypatch, stub + "echo 'over the limit' >&2; exit 1")
    with pytest.raises(ValueError, match="sbatch refused the job: over the limit") as refused:
        run.main(compose("pipeline", texts))
    if not taken:
        assert not (tmp_path / "run").exists() and "already" not in str(refused.value)
        return
    assert str(refused.value).endswith(
        "\n  already submitted: base (1), left (2); scancel 1 2 before the same command again"
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["base", "left", "manifest.json"]
    assert [record.job_id for record in read_manifest(tmp_path / "run").stages] == ["1", "2", None]


def test_further_options_of_sbatch_are_passed_on(tmp_path):
    options = ["--exclude=dgx[07-08]", "--reservation=big"]
    cluster = ClusterConfig(kind="slurm", sbatch_options=options)
    argv = slurm.submission(stage(tmp_path), ParallelConfig(data=8), cluster, pipeline="p", after=[], lead=600)
    assert [text for text in argv if text in options] == options
    assert argv.index(options[-1]) < argv.index(str(slurm.script("train.sbatch")))


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


def _start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str, verb: str = "sft"
) -> tuple[int, bool]:
    """(exit code, whether queued again) of a start of job 7 in which `body` stands for srun or the pipeline."""
    requeued = tmp_path / "requeued"
    requeued.unlink(missing_ok=True)
    with monkeypatch.context() as patched:
        shutil.rmtree(tmp_path / "bin", ignore_errors=True)
        _commands(tmp_path, patched, "", srun=body, python=body, scontrol=f'echo "$*" > {requeued}', sleep="")
        patched.chdir(tmp_path)
        variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "dgx[1-2]"}
        variables |= {"NEMO_ALIGN_PYTHON": str(tmp_path / "bin" / "python")}
        argv = ["bash", str(slurm.script(name)), verb]
        code = subprocess.run(argv, env={**os.environ, **variables}, check=False).returncode
    assert not requeued.exists() or requeued.read_text() == "requeue 7\n"
    return code, requeued.exists()


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    ("code", "requeued"), [(0, False), (1, True), (2, False), (75, True), (76, True), (130, False), (137, True)]
)
def test_what_another_start_may_get_past_goes_back_into_the_queue(tmp_path, monkeypatch, name, code, requeued):
    assert _start(tmp_path, monkeypatch, name, f"exit {code}") == (code, requeued)


def test_verbs_that_train_nothing_are_not_tried_again(tmp_path, monkeypatch):
    assert _start(tmp_path, monkeypatch, "train.sbatch", "exit 1", verb="plan") == (1, False)


@pytest.mark.parametrize(("first", "expected"), [("2", (2, False)), ("75", (75, True)), ("130", (130, False))])
def test_the_first_rank_to_end_knows_why(tmp_path, monkeypatch, first, expected):
    """srun's code is that of the ranks that it killed because one had ended."""
    body = f'echo "end {first}" >> "$NEMO_ALIGN_PROGRESS_NOTE"; echo "end 1" >> "$NEMO_ALIGN_PROGRESS_NOTE"; exit 137'
    assert _start(tmp_path, monkeypatch, "train.sbatch", body) == expected


@pytest.mark.parametrize("name", SCRIPTS)
def test_failures_end_a_job_only_where_no_checkpoint_came_in_between(tmp_path, monkeypatch, name, capfd):
    def start(step: int | None, code: int) -> bool:
        told = "" if step is None else f'echo "step runs/a {step}" >> "$NEMO_ALIGN_PROGRESS_NOTE"; '
        return _start(tmp_path, monkeypatch, name, f"{told}exit {code}")[1]

    for step in (None, 100, 200, 300, 400, 500):  # each start comes further: a passing fault every time
        assert start(step, 1)
    assert all(start(600, 75) for _ in range(20))  # time limits count for nothing
    assert [start(600, 137) for _ in range(4)] == [True, True, True, False]
    assert "failed with exit code 137, time 4 from this checkpoint (step runs/a 600): it ends" in capfd.readouterr().out
    assert not list(tmp_path.glob(".nemo_align*"))


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


def test_a_hung_run_goes_back_into_the_queue(tmp_path, monkeypatch, capfd):
    # srun's own code is that of the task that had to be killed.
    body = 'echo "no answer from rank 3 (host dgx2, pid 9)" >> "$NEMO_ALIGN_HANG_NOTE"; exit 137'
    starts = [_start(tmp_path, monkeypatch, "train.sbatch", body) for _ in range(4)]
    assert starts == [(exit_codes.HUNG, True)] * 3 + [(exit_codes.HUNG, False)]
    said = capfd.readouterr().out
    assert "no answer from rank 3 (host dgx2, pid 9)" in said
    again = "9:59 before its time limit: back into the queue, after 0 restarts"
    assert f"job 7 made no progress, time 1 from this checkpoint (none yet), {again}" in said
    assert not list(tmp_path.glob(".nemo_align_hang*"))


def _commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str, **others: str) -> None:
    """Put small stand-ins of SLURM's commands first in PATH: of a job that runs, with ten minutes left."""
    folder = tmp_path / "bin"
    folder.mkdir()
    squeue = 'case "$*" in *%L*) echo 9:59 ;; *) echo RUNNING ;; esac'
    for name, body in {"sbatch": sbatch, "squeue": squeue, **others}.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
