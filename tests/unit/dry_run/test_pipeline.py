"""A dry run of a pipeline: every stage with the model of the stage that it starts from."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stage_inputs import MODEL, StageInputs, stage_overrides
from tests.unit.dry_run.child import ROOT


def chain(inputs: StageInputs, *extra: str) -> list[str]:
    """Arguments of a chain of two stages, whose second has no model of its own."""
    one, two = ([*stage_overrides(inputs, "sft"), *more] for more in (MODEL, ["precision=fp32", "parallel=tp2"]))
    texts = [f"stages.{name}.verb=sft" for name in ("one", "two")] + ["stages.two.init_from=one"]
    texts += [f"stages.{name}.overrides={overrides!r}" for name, overrides in (("one", one), ("two", two))]
    return ["pipeline", *texts, "run_dir=mine", "dry_run=true", *extra]


def start(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "nemo_align.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.full
def test_stages_are_dry_run_one_after_another(tmp_path: Path, stage_inputs: StageInputs) -> None:
    done = start(chain(stage_inputs), tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^# (\w+)$", done.stdout, re.MULTILINE) == ["one", "two"]
    assert done.stdout.count(": sft of nemotron4_tiny, 132,288 parameters") == 2
    assert "initial weights: mine/one" in done.stdout and "2 processes: tensor 2" in done.stdout
    # What stage one will write is no file that is missing.
    assert "not on this machine" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_would_be_refused_is_named_and_the_others_are_shown(
    tmp_path: Path, stage_inputs: StageInputs
) -> None:
    refused = [*stage_overrides(stage_inputs, "sft"), "train.epochs=1", "optimizer.warmup_steps=9", "~train.max_steps"]
    done = start([*chain(stage_inputs), f"stages.two.overrides={refused!r}"], tmp_path)
    assert done.returncode == 2
    assert "error: two: optimizer.warmup_steps=9, but the stage has 4 steps: lower it" in done.stderr
    assert done.stdout.count(": sft of nemotron4_tiny") == 1


@pytest.mark.full
def test_files_that_are_not_here_are_named_or_refused(tmp_path: Path, stage_inputs: StageInputs) -> None:
    missing = [*MODEL, *stage_overrides(stage_inputs, "sft"), "data.train.rows.path=nowhere.jsonl"]
    arguments = [*chain(stage_inputs), f"stages.one.overrides={missing!r}"]
    done = start([*arguments, "dry_run_strict=true"], tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert "stage one: data.train.rows.path=nowhere.jsonl does not exist" in done.stderr


@pytest.mark.full
def test_the_340b_as_jobs_of_a_cluster(tmp_path: Path) -> None:
    arguments = ["cluster=dgx_h100", "cluster.partition=batch", "cluster.container_image=/images/a.sqsh"]
    arguments += ["cluster.container_mounts=['/data:/data']", 'overrides=["data.root=/data"]']
    done = start(["pipeline", "+experiment=nemotron4_340b/recipe", *arguments, "dry_run=true"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"--container-mounts={tmp_path}:{tmp_path},/data:/data --container-workdir={tmp_path}" in done.stdout
    assert (
        len(re.findall(r"^job_\w+=\$\(sbatch .*--partition=batch .*--time=04:00:00", done.stdout, re.MULTILINE)) == 10
    )
    assert re.search(
        r"^job_pretrain=\$\(sbatch .*recipe/pretrain --nodes=768 --ntasks-per-node=8", done.stdout, re.MULTILINE
    )
    assert re.search(
        r"^job_dpo=\$\(sbatch .*recipe/dpo --nodes=24 .*afterok:\$\{job_general_sft%;\*\}:\$\{job_score_pairs%;\*\}",
        done.stdout,
        re.MULTILINE,
    )
    assert "/data/tokenizer.model (data.tokenizer)" in done.stdout
    # Each stage by the lead that its job would have.
    leads = re.findall(r"^job_\w+=\$\(sbatch .* --signal=TERM@(\d+)", done.stdout, re.MULTILINE)
    del leads[5]  # scoring saves nothing
    assert re.findall(r"^  told to stop (\d+) s before", done.stdout, re.MULTILINE) == leads
    assert leads[0] == "600" and int(leads[2]) > 900 and done.stderr == ""


@pytest.mark.full
def test_a_chain_takes_the_nodes_that_the_cluster_gives(tmp_path: Path) -> None:
    nodes = ["cluster=dgx_h100", "cluster.nodes=4"]
    keep = [f"~stages.{name}" for name in ("reward", "score_pairs", "dpo", "rpo_1", "rpo_2", "rpo_3", "general_sft")]
    done = start(["pipeline", "+experiment=nemotron4_15b/recipe", *nodes, *keep, "dry_run=true"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("32 processes, 4 nodes of 8: tensor 8 x pipeline 1 x data 4") == 2
    assert done.stdout.count("32 processes, 4 nodes of 8: tensor 4 x pipeline 1 x data 8") == 1


@pytest.mark.full
def test_a_reader_may_have_seen_enough(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "nemo_align.cli", "pipeline", "+experiment=minitron_4b/recipe"]
    with subprocess.Popen(
        [*command, "dry_run=true"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "# pretrain\n"
        process.stdout.close()
        assert process.stderr.read() == ""
