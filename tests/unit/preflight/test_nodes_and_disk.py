"""Nodes against each other, room and speed of the disk, and the report."""

from copy import deepcopy

import pytest

from nemo_align.config.compose import compose
from nemo_align.model.counts import count_parameters
from nemo_align.preflight import disk, node
from nemo_align.preflight.checks import FAILED, NOTE, OK, WARNING, Check, exit_code, report
from nemo_align.preflight.disk import Disk
from nemo_align.preflight.files import Missing
from nemo_align.preflight.node import Node


def nodes(*changes: dict) -> list[Node]:
    """One node for each of `changes`."""
    usual = {"versions": {"torch": "2.9.1"}, "gpus": 8, "ranks": 8}
    return [Node(**{"name": f"dgx{number}", **usual, **change}) for number, change in enumerate(changes, start=1)]


def failures(found: list[Node]) -> list[str]:
    return [check.text for check in node.check_nodes(found) if check.status == FAILED]


def test_nodes_alike_pass():
    assert failures(nodes({}, {}, {})) == []
    assert failures(nodes({"gpus": 0}, {"gpus": 0})) == []  # CPUs
    assert failures(nodes({"gpus": 1}, {"gpus": 1})) == []  # SLURM gave each rank one


def test_a_node_of_another_version_or_with_a_dead_gpu_is_named():
    assert failures(nodes({}, {"versions": {"torch": "2.8.0"}}, {})) == [
        "torch differs: 2.9.1 on most nodes, 2.8.0 on dgx2"
    ]
    assert failures(nodes({}, {}, {"gpus": 7})) == ["fewer than ranks: dgx3 7 for 8 ranks"]


def test_drivers_and_numbers_of_gpus_that_differ_are_a_warning():
    found = nodes(
        {"versions": {"driver": "535.1"}}, {"versions": {"driver": "535.1"}}, {"versions": {"driver": "570.2"}}
    )
    assert [(check.status, check.text) for check in node.check_nodes(found)][:1] == [
        (WARNING, "driver differs: 535.1 on most nodes, 570.2 on dgx3")
    ]
    checks = list(node.check_nodes(nodes({"ranks": 4}, {"ranks": 4}, {"ranks": 4, "gpus": 7})))
    assert [check.text for check in checks if check.status == WARNING] == [
        "enough for the ranks, but fewer than the 8 of most nodes: dgx3 7"
    ]


def test_what_a_node_finds_wrong_with_itself_is_said_once_and_with_its_name():
    apex = Check(name="apex", status=FAILED, text="another apex", remedy="pip uninstall apex")
    assert failures(nodes({}, {"wrong": [apex]}, {})) == ["another apex (on dgx2)"]
    assert failures(nodes({"wrong": [apex]}, {"wrong": [apex]})) == ["another apex"]


def test_the_smallest_gpu_counts():
    assert node.smallest_memory(nodes({"memory": 85}, {"memory": 79}, {})) == 79
    assert node.smallest_memory(nodes({}, {})) is None


def test_files_that_only_some_nodes_have():
    lacks = {"missing": [Missing("data.train.a.path=rows.jsonl does not exist", "put it there")]}
    assert failures(nodes({}, lacks)) == ["data.train.a.path=rows.jsonl does not exist (on dgx2)"]
    assert failures(nodes(lacks, lacks)) == ["data.train.a.path=rows.jsonl does not exist"]


@pytest.fixture
def config():
    return compose("sft", ["+experiment=nemotron4_340b/code_sft"], check_files=False)


@pytest.mark.parametrize(
    ("free", "rate", "expected", "said"),
    [
        (100e12, 80e9, OK, "3 checkpoints stay; a checkpoint has 4.77 TB: 60 s"),
        (14.4e12, 80e9, OK, "needs 14.3 TB, 14.4 TB free"),
        (14.2e12, 80e9, FAILED, "/lustre: needs 14.3 TB, 14.2 TB free"),
        (100e12, 20e9, WARNING, "more than the 600 s between the signal and the time limit hold"),
    ],
)
def test_the_340bs_checkpoints_against_free_space_and_speed(config, free, rate, expected, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = {f"dgx{number}": Disk("/lustre", int(free), int(rate / 4), 1.0) for number in range(4)}
    check = disk.check_disk(seen, {"code_sft": config})
    assert check.status == expected and said in check.text
    if expected == FAILED:
        assert check.remedy == (
            "run_dir=<folder on a larger file system>, or checkpoint.keep_last=1, which needs 9.55 TB"
        )


def test_a_recipe_needs_what_all_its_stages_leave_behind(config, tmp_path):
    """Two stages of three checkpoints, one of a single one with its export, and scores, which leave none."""
    last, score = deepcopy(config), compose("score", ["+experiment=nemotron4_340b/score_pairs"], check_files=False)
    last.checkpoint.save_every, last.checkpoint.export_hf = None, True
    stages = {"one": config, "two": deepcopy(config), "last": last, "score": score}
    for name, stage in stages.items():
        stage.run_dir = str(tmp_path / name)
    size = disk.bytes_of_checkpoint(config)
    exported = 2 * count_parameters(config.model).total
    need = disk.need_of(stages)
    assert (need.count, need.largest) == (7, size)
    assert need.num_bytes == 7 * size + exported and need.fewest_bytes == 5 * size + exported
    # What lies there already, of an earlier start, needs no more room.
    written = tmp_path / "one" / "checkpoints" / "step_0000250" / "part"
    written.parent.mkdir(parents=True)
    written.write_bytes(bytes(1000))
    assert disk.need_of(stages).num_bytes == need.num_bytes - 1000
    check = disk.check_disk({"login": Disk("/lustre", int(1e12), int(1e9), 1.0)}, stages)
    assert check.status == FAILED
    assert "needs 34.1 TB, 1 TB free: 7 checkpoints of 4 stages stay; the largest checkpoint has 4.77 TB" in check.text
    assert "or checkpoint.keep_last=1 in every stage that trains" in check.remedy


def test_a_stage_that_ends_before_its_first_periodic_save_leaves_one_checkpoint(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.train.max_steps = 250  # saves every 250
    assert disk.need_of({"short": config}).count == 1
    config.train.max_steps = 251
    assert disk.need_of({"short": config}).count == 2


def test_a_disk_is_looked_at_and_left_as_it_was(tmp_path):
    found = disk.look(tmp_path / "runs" / "not" / "yet", "a", num_bytes=2**20)
    assert (
        found.folder == str(tmp_path) and found.written_bytes >= 2**20 and found.seconds > 0 and found.problem is None
    )
    assert list(tmp_path.iterdir()) == []
    broken = Disk("/lustre", 0, 0, 0.0, "Read-only file system")
    check = disk.check_disk({"dgx1": found, "dgx2": broken}, {})
    assert check.status == FAILED and check.text == "/lustre cannot be written on dgx2: Read-only file system"
    assert disk.check_shared({"dgx1": True, "dgx2": False}).text == "dgx2 does not see what rank 0 writes"


def test_the_report_ends_with_what_is_wrong():
    checks = [
        Check(name="disk", status=FAILED, text="full", remedy="make room"),
        Check(name="apex", status=OK, text="not installed"),
        Check(name="driver", status=NOTE, text="none"),
    ]
    assert report(checks).splitlines() == [
        "ok       apex           not installed",
        "note     driver         none",
        "failed   disk           full",
        "         remedy: make room",
        "3 checks: 1 failed",
    ]
    assert (exit_code(checks), exit_code(checks[1:])) == (2, 0)
    assert report([checks[0]] * 2).splitlines()[:-1] == ["failed   disk           full"] * 2 + [
        "         remedy: make room"
    ]
    assert report(checks[1:]).endswith("2 checks: nothing wrong")
