"""`nemo-align doctor` as a user starts it: alone, and on the ranks of a layout."""

import re
import subprocess
import sys

import pytest

from nemo_align.runtime import exit_codes
from tests.end_to_end import commands
from tests.stage_inputs import MODEL, stage_overrides


def test_on_the_ranks_of_a_layout(stage_inputs, tmp_path):
    layout = ["parallel.tensor=2", "parallel.data=2", "run_dir=run"]
    done = commands.run("doctor", "verb=sft", *MODEL, *stage_overrides(stage_inputs, "sft"), *layout, cwd=tmp_path)
    said = done.stdout
    assert "ok       configuration  sft (sft)" in said, said + done.stderr
    for kind, groups in (("tensor", 2), ("data", 2)):
        assert re.search(rf"links +{kind}: {groups} groups, all-reduce [\d.e+-]+ GB/s, the slowest ", said), said
    assert re.search(r"links +all ranks: all-reduce [\d.e+-]+ GB/s", said)
    assert re.search(
        r"disk +\S+: needs [\d.]+ [MG]B, [\d.]+ [GT]B free: .*; a checkpoint has .* written by 1 node", said
    )
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind
    # Four processes share the cores of whatever runs this: one may look slow. Nothing else may be wrong.
    wrong = [line for line in said.splitlines() if line.startswith("failed")]
    assert all(" is slow: " in line for line in wrong), said
    assert done.returncode == (exit_codes.USER_ERROR if wrong else exit_codes.SUCCESS)


def test_a_mistake_and_missing_files_are_named_with_their_remedies(tmp_path):
    done = commands.run("doctor", "+experiment=nemotron4_340b/code_sft", cwd=tmp_path)
    assert done.returncode == exit_codes.USER_ERROR
    assert (
        "failed   files          data.train.code_sft.path=data/nemotron4/code_sft/train.jsonl does not exist"
        in done.stdout
    )
    assert "remedy: put it there, or name a folder that all nodes see: data.root=<folder>" in done.stdout
    assert "a checkpoint has 4.77 TB" in done.stdout
    assert "ok       plan           nemotron4_340b/code_sft on 192 GPUs: " in done.stdout
    done = commands.run("doctor", "+experiment=nemotron4_340b/code_sft", "optimzer.lr=1", cwd=tmp_path)
    assert "failed   configuration  unknown key 'optimzer.lr'; did you mean 'optimizer.lr'?" in done.stdout
    done = commands.run("doctor", "+experiment=nemotron4_340b/cod_sft", cwd=tmp_path)
    assert "unknown experiment 'nemotron4_340b/cod_sft'; did you mean 'nemotron4_340b/code_sft'?" in done.stdout


def test_all_stages_of_a_recipe_are_looked_at(tmp_path):
    done = commands.run("doctor", "+experiment=nemotron4_340b/recipe", cwd=tmp_path)
    assert "10 stages; links in the layout of the largest, nemotron4_340b/pretrain" in done.stdout
    assert "stage code_sft: data.train.code_sft.path=data/nemotron4/code_sft/train.jsonl does not exist" in done.stdout
    assert re.search(r"disk +\S+: needs 129 TB, \S+ [GT]B free: 27 checkpoints of 10 stages stay", done.stdout)
    assert "checkpoint.init_from" not in done.stdout  # earlier stages make them
    for name, gpus in (("pretrain", "6,144"), ("score_pairs", "96"), ("rpo_3", "192")):
        assert re.search(rf"^ok       plan           {name} on {gpus} GPUs: [\d.]+ of 84.9 GB", done.stdout, re.M)


def test_a_plan_that_does_not_fit_is_a_failure_with_the_nearest_changes(tmp_path):
    layout = ["parallel=tp8_pp12", "parallel.data=1"]
    done = commands.run("doctor", "+experiment=nemotron4_340b/code_sft", *layout, cwd=tmp_path)
    assert done.returncode == exit_codes.USER_ERROR
    failed = re.search(r"^failed   plan  .*it does NOT fit\n +remedy: (.*)", done.stdout, re.M)
    assert failed is not None and "parallel.recompute=full" in failed[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], exit_codes.SUCCESS), (["+experiment=nemotron4_340b/dpo"], exit_codes.USER_ERROR)],  # its files are not here
)
def test_alone_it_needs_no_torch(arguments, expected, tmp_path):
    code = (
        f"import sys; from nemo_align.cli import main; code = main({['doctor', *arguments]!r}); "
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules), 'heavy'; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=commands.environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == expected, done.stdout + done.stderr
    assert "versions" in done.stdout and "apex" in done.stdout


def test_a_run_times_its_links_first_where_asked(stage_inputs, tmp_path):
    layout = ["parallel.tensor=2", "parallel.data=2", "runtime.check_links=true", "train.max_steps=1", "run_dir=run"]
    done = commands.run("sft", *MODEL, *stage_overrides(stage_inputs, "sft"), *layout, cwd=tmp_path)
    assert done.returncode == exit_codes.SUCCESS, done.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    for kind in ("tensor: 2 groups", "data: 2 groups", "all ranks"):
        assert re.search(rf"links: {kind}[:,] all-reduce [\d.e+-]+ GB/s", log), log
    assert log.index("links: ") < log.index("sft 1/1")
