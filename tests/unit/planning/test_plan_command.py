"""`nemo-align plan`: composing, printing, JSON; quick and without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_align.cli import main
from nemo_align.config.compose import ConfigError, compose, to_yaml
from nemo_align.config.job_size import job_layout
from nemo_align.planning import report
from nemo_align.runtime import exit_codes

ROOT = Path(__file__).resolve().parents[3]
PAPER = ["model=nemotron4_340b", "parallel=tp8_pp12", "gpus=6144", "train.global_batch_size=2304"]
EXPERIMENTS = {
    "quickstart/pretrain": "pretrain",
    "quickstart/continued_pretrain": "pretrain",
    "quickstart/code_sft": "sft",
    "quickstart/reward": "reward",
    "quickstart/rpo_3": "preference",
}


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No run directory of an earlier quickstart in sight."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("experiment, verb", EXPERIMENTS.items())
def test_an_experiment_is_composed_by_its_own_verb(experiment, verb):
    found = compose("plan", [f"+experiment={experiment}"])
    assert (found.verb, found.stage.model.num_layers) == (
        verb,
        4,
    )  # the model of the stage that comes first in the chain
    assert found.stage.experiment == experiment
    assert found.plan.gpus == found.stage.parallel.tensor * found.stage.parallel.pipeline * found.stage.parallel.data


def test_an_experiment_is_chosen_without_a_plus_too():
    assert compose("plan", ["experiment=quickstart/code_sft"]).verb == "sft"
    named = compose("plan", ["+experiment=quickstart/code_sft", "experiment=mine"])
    assert (named.verb, named.stage.experiment) == ("sft", "mine")


def test_replicas_of_the_command_line_set_aside_the_gpus_of_a_recipe():
    recipe = "+experiment=minitron_4b/pretrain"  # which says 8
    assert compose("plan", [recipe, "parallel.data=8"]).plan.gpus == 16
    assert compose("plan", [recipe, "parallel.data=null"]).plan.gpus == 8
    with pytest.raises(ConfigError, match="gpus=8 is not"):
        compose("plan", [recipe, "parallel.data=8", "gpus=8"])


def test_small_stages_have_gpu_hours_too():
    assert [report._hours(hours) for hours in (0.1311, 2.034, 52.38, 11_514_701.2)] == [
        "0.13",
        "2.03",
        "52",
        "11,514,701",
    ]


def test_the_configuration_can_be_shown():
    text = to_yaml(compose("plan", PAPER))
    assert "gpus: 6144" in text and "hidden_size: 18432" in text and "data: 64" in text


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["gpu=8"], "unknown key 'gpu'; did you mean 'gpus'?"),
        ([*PAPER, "optimzer.lr=1"], "unknown key 'optimzer.lr'; did you mean 'optimizer.lr'?"),
        ([*PAPER, "parallel.tensr=1"], "did you mean 'parallel.tensor'?"),
        ([*PAPER, "reward.attributes=[a]"], "it belongs to reward"),
        ([*PAPER[:-1]], "train.global_batch_size is missing"),
        (["model=nemotron4_340b", "train.global_batch_size=8", "parallel=tp8", "gpus=12"], "gpus=12 cannot form"),
        (
            [*PAPER[:3], "train.global_batch_size=108"],
            "108 is not divisible by train.micro_batch_size 1 x parallel.data 64",
        ),
        (["+experiment=quickstart/score_code"], "which trains nothing to plan"),
        (["+experiment=quickstart/recipe", "search=true", "gpus=8"], "search= is for one stage"),
        (["+experiment=quickstart/recipe", "gpus=3"], "stages code_sft, general_sft, dpo: gpus=3 cannot form"),
        (["+experiment=quickstart/nothing"], "unknown experiment"),
        (["verb=convert"], "verb is 'convert', but must be one of pretrain, sft, reward, preference"),
        (["verb=sft", "train.global_batch_size=8"], "no model: choose one with model="),
        ([*PAPER, "gpus=96"], "once"),
        (["gpus=many"], "gpus is 'many', but must be a whole number"),
        (["gpus=0"], "gpus is 0, but must be at least 1"),
        ([*PAPER[:2], PAPER[3], "search=true"], "search=true needs the number of GPUs"),
        ([*PAPER, "search=true", "scaling=true"], "one after the other"),
        ([*PAPER, "plot=a.png"], "add scaling=true"),
        ([*PAPER, "write_gb_per_second=0"], "must be positive"),
        ([*PAPER, "json=."], "json=. is a folder: name a file in it"),
        ([*PAPER, "scaling=true", "plot=a.gif"], "plot=a.gif: the file must end in .png, .svg, .pdf"),
        (["experiment=quickstart/code_sfd"], "did you mean '+experiment=quickstart/code_sft'?"),
    ],
)
def test_wrong_plans_are_refused(arguments, said):
    with pytest.raises(ConfigError) as error:
        compose("plan", arguments)
    assert said in str(error.value)


def test_hydras_views_belong_to_the_stages_verb(capsys):
    assert main(["plan", "--multirun", *PAPER]) == main(["plan", "--info"]) == 2
    assert "search=true" in capsys.readouterr().err


def test_the_report_says_that_the_papers_layout_fits(capsys, tmp_path):
    assert main(["plan", *PAPER, "json=plan.json"]) == 0
    printed = capsys.readouterr().out
    assert "341,029,195,776 in the model" in printed
    assert "fits on 80 GB" in printed and "MFU 4" in printed
    assert "activations of one micro-batch: 2.14 GB on a stage, in 8 chunks" in printed
    assert "of it by transfers between stages" in printed
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["parameters"] == 341_029_195_776
    assert (
        sum(8 * sum(c["layers"] + c["embedding"] + c["output"] for c in s["chunks"]) for s in written["stages"])
        + sum(c["norms"] for s in written["stages"] for c in s["chunks"])
        == written["parameters"]
    )
    (batches,) = written["batches"]
    assert batches["memory"]["verdict"] == "fits"
    assert 100 * batches["mfu"] == pytest.approx(41.0, abs=1.0)
    assert len(written["stages"]) == 12


def test_what_does_not_fit_comes_with_a_remedy(capsys):
    assert main(["plan", *PAPER[:2], "gpus=96", "train.global_batch_size=768"]) == exit_codes.USER_ERROR
    printed = capsys.readouterr().out
    assert "does NOT fit on 80 GB" in printed and "parallel.recompute=full" in printed


def test_a_search_without_a_layout_that_fits_ends_with_an_error_code(capsys):
    arguments = ["plan", "model=nemotron4_340b", "train.global_batch_size=768", "search=true"]
    assert main([*arguments, "gpus=16"]) == exit_codes.USER_ERROR
    assert "None fits: the smallest needs " in capsys.readouterr().out


def test_the_replicas_follow_from_gpus():
    recipe = "+experiment=nemotron4_340b/pretrain"  # names 64
    assert compose("plan", [recipe, "gpus=1536"]).stage.parallel.data == 16
    with pytest.raises(ConfigError, match=r"gpus=1536 is not .* x parallel\.data=8 = 768: set gpus=768"):
        compose("plan", [recipe, "gpus=1536", "parallel.data=8"])
    dry = compose("pretrain", [recipe, "gpus=1536", "dry_run=true"])
    assert dry.parallel.data is None and job_layout(dry).data == 16
    assert compose("pretrain", [recipe, "dry_run=true"]).parallel.data == 64


def test_a_batch_that_the_replicas_of_gpus_cannot_share_is_named_with_them():
    with pytest.raises(ConfigError, match=r"parallel\.data 16 = 16: use 576 or 768"):
        compose("plan", [*PAPER[:2], "gpus=1536", "train.global_batch_size=700"])


def test_one_replica_is_noted_where_nobody_said_how_many(capsys):
    arguments = ["plan", "model=nemotron4_15b", "parallel=tp8", "train.global_batch_size=64"]
    for more, noted in (([], True), (["gpus=8"], False), (["parallel.data=1"], False)):
        assert main([*arguments, *more]) == 0
        assert ("one replica: set gpus=" in capsys.readouterr().out) == noted


@pytest.mark.parametrize("argument", ["json=nowhere/plan.json", "plot=nowhere/scaling.png"])
def test_a_folder_to_write_to_is_looked_for_first(argument):
    more = ["scaling=true"] if argument.startswith("plot") else []
    with pytest.raises(ConfigError, match=f"{argument}: the folder nowhere does not exist"):
        compose("plan", [*PAPER, argument, *more])


def test_a_recipe_is_a_table_of_its_stages(capsys, tmp_path):
    assert main(["plan", "+experiment=quickstart/recipe", "json=recipe.json"]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "recipe.json").read_text())
    assert list(written) == [
        "pretrain", "continued_pretrain", "code_sft", "general_sft", "reward", "dpo", "rpo_1", "rpo_2", "rpo_3",
    ]  # fmt: skip
    assert all(f"\n{name} " in printed for name in written)
    assert written["pretrain"]["total"]["steps"] == 220 and written["rpo_3"]["total"] is None
    assert "nothing is trained there: score_code" in printed


def test_a_recipe_says_how_large_its_job_is_and_a_cluster_or_the_command_says_otherwise():
    assert compose("plan", ["+experiment=minitron_4b/pretrain"]).plan.gpus == 8
    assert compose("plan", ["+experiment=minitron_4b/pretrain", "gpus=32"]).stage.parallel.data == 16
    recipe = ["+experiment=nemotron4_15b/recipe", "cluster=dgx_h100", "cluster.nodes=4"]
    for more, expected in (([], 32), (["gpus=16"], 16)):
        stages = compose("plan", [*recipe, *more]).stages
        assert {stage.plan.gpus for stage in stages.values()} == {expected}


def test_search_and_scaling_are_printed(capsys):
    arguments = ["model=nemotron4_15b", "gpus=64", "train.global_batch_size=256"]
    assert main(["plan", *arguments, "search=true", "top=3"]) == 0
    assert "the first as overrides: gpus=64 " in capsys.readouterr().out
    assert main(["plan", *arguments, "parallel=tp8", "scaling=true"]) == 0
    printed = capsys.readouterr().out
    assert "weak scaling" in printed and "strong scaling" in printed


def test_a_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["plan", *PAPER, "scaling=true", "plot=scaling.png"]) == 0
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert main(["plan", *PAPER, "scaling=true", "plot=scaling.gif"]) == 2


@pytest.mark.parametrize("more", [["scaling=true"], ["search=true"]])
def test_a_plan_takes_less_than_two_seconds_and_no_torch(more, tmp_path):
    """CPU seconds of a whole process, its start included: other work on the machine does not count."""
    code = (
        "import sys, time; from nemo_align.cli import main\n"
        f"code = main({['plan', *PAPER, *more]!r})\n"
        "heavy = [name for name in ('torch', 'megatron', 'transformers', 'matplotlib') if name in sys.modules]\n"
        "print(code, heavy, time.process_time())"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    last = finished.stdout.splitlines()[-1]
    assert last.startswith("0 [] ")
    assert float(last.split()[-1]) < 2.0
