"""Table and report: the right numbers, and a page that loads nothing from elsewhere."""

import io
import re
import sys

import pytest
from rich.console import Console

from nemo_align.pipeline.manifest import Manifest, StageRecord, read_manifest
from nemo_align.pipeline.summary import refresh, summarize
from nemo_align.pipeline.table import held_out, key_changes, print_table
from nemo_align.training.metrics import MetricsWriter
from nemo_align.training.result import StageResult, write_result


@pytest.fixture
def run_dir(tmp_path):
    """A pipeline of a reward stage that is complete, though no process wrote it into the manifest, and one pending."""
    reward = tmp_path / "reward"
    writer = MetricsWriter(reward)
    for step in range(1, 31):
        writer.write({"kind": "train", "step": step, "loss": 2 / step, "perf/mfu": 0.4, "perf/mfu_padded": 0.5})
    first = {"validation/a/pearson": 0.0, "validation/a/mae": 0.9, "validation/a/mae_of_mean": 0.8}
    last = {"validation/a/pearson": 0.3, "validation/a/mae": 0.7, "validation/a/mae_of_mean": 0.8}
    for step, metrics in (0, first), (30, last):
        writer.write({"kind": "validation", "step": step, **metrics})
    write_result(
        reward,
        StageResult(
            verb="reward",
            experiment="reward",
            steps=30,
            tokens=12345,
            seconds=100.0,
            train_seconds=60.0,
            layout={"tensor": 2, "pipeline": 1, "data": 2, "sequence": True, "world_size": 4},
            output="checkpoints/step_0000030",
            first=first,
            last=last,
            mfu=0.4,
            mfu_padded=0.5,
            mfu_causal=0.38,
            tokens_per_second_per_gpu=1000.0,
            peak_tflops=0.06,
            peak_source="measured at start: CPU",
            forward_only={"validation": {"seconds": 20.0, "mfu": 0.3}},
        ),
    )
    records = [
        StageRecord(name="reward", verb="reward", run_dir=str(reward), status="running"),
        StageRecord(name="dpo<1>", verb="preference", run_dir=str(tmp_path / "dpo")),
    ]
    Manifest(recipe="test/recipe", stages=records).write(tmp_path)
    return tmp_path


def test_refresh_takes_over_what_ended_unwatched(run_dir):
    refresh(run_dir)
    reward, dpo = read_manifest(run_dir).stages
    assert (reward.status, reward.tokens, reward.seconds, reward.mfu) == ("complete", 12345, 100.0, 0.4)
    assert dpo.status == "pending"


def test_the_mean_over_held_out_sets_is_exact_about_names():
    metrics = {
        "validation/a/mae": 1.0,
        "validation/b/mae": 3.0,
        "validation/a/mae/clarity": 9.0,
        "validation/a/mae_of_mean": 9.0,
    }
    assert held_out(metrics, "mae") == 2.0
    assert held_out(metrics, "pearson") is None


def test_key_changes_know_which_direction_is_better(run_dir):
    changes = {change.label: change for change in key_changes(refresh(run_dir)["reward"])}
    assert str(changes["Pearson"]) == "Pearson 0.000 → 0.300" and changes["Pearson"].better
    assert str(changes["MAE"]) == "MAE 0.900 → 0.700" and changes["MAE"].better
    assert str(changes["MAE of the mean"]) == "MAE of the mean 0.800"
    worse = StageRecord(
        name="x", verb="sft", metrics={"first": {"validation/a/loss": 1}, "last": {"validation/a/loss": 2}}
    )
    assert key_changes(worse)[0].better is False


def test_the_table_is_one_plain_line_per_stage_without_a_terminal(run_dir):
    console = Console(file=io.StringIO(), force_terminal=False)
    print_table(refresh(run_dir), console)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 4 and "\x1b" not in console.file.getvalue()
    assert lines[2].split()[:6] == ["reward", "reward", "complete", "TP2", "PP1", "DP2"]
    assert "12,345  1:40" in lines[2] and "4,000  40.0%" in lines[2]  # tokens/s of all four devices


def test_the_report_is_whole_and_self_contained(run_dir, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    summarize(run_dir, refresh(run_dir))
    page = (run_dir / "report.html").read_text()
    assert str(run_dir / "report.html") in capsys.readouterr().out
    assert page.count("<svg") == 5  # where the time went; loss, two held-out charts, MFU
    for what in (
        "12,345",
        "TP2 PP1 DP2 SP",
        "40.0%",
        "causal 38.0%",
        "20% of time",
        "not halved for causality",
        "measured at start",
    ):
        assert what in page, what
    assert "dpo&lt;1&gt;" in page and "dpo<1>" not in page
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r'(?:src|href)="(?!#)|url\((?!#)|@import|<script', outside)


def test_a_report_written_twice_differs_only_in_its_date(run_dir):
    pytest.importorskip("matplotlib")
    pages = []
    for _ in range(2):
        summarize(run_dir, refresh(run_dir))
        pages.append(re.sub(r"written [\d :-]+", "", (run_dir / "report.html").read_text()))
    assert pages[0] == pages[1]


def test_without_the_extra_the_table_still_comes(run_dir, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    summarize(run_dir, refresh(run_dir))
    said = capsys.readouterr()
    assert "reward" in said.out and "nemo_align[report]" in said.err
