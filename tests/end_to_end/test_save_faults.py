"""A save that fails, and a command that is killed while it saves: what the user reads, and what is left behind."""

from __future__ import annotations

import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from nemo_align.checkpoint import store
from nemo_align.training.metrics import read_metrics
from tests.end_to_end.commands import command, environment, run
from tests.stage_inputs import MODEL, StageInputs, stage_overrides


def arguments(inputs: StageInputs) -> list[str]:
    overrides = [*MODEL, *stage_overrides(inputs, "sft"), "train.max_steps=6", "parallel.data=2", "run_dir=run"]
    return ["sft", *overrides, "checkpoint.save_every=1", "train.validate_at_start=false"]


def small_files_only() -> None:
    """In the child: no file above 120,000 bytes; a rank's part of a checkpoint is about ten times that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, resource.RLIM_INFINITY))


def test_a_save_that_cannot_be_written_ends_in_one_line(stage_inputs: StageInputs, tmp_path: Path) -> None:
    ended = subprocess.run(
        command(*arguments(stage_inputs)),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        preexec_fn=small_files_only,
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    [line] = {line for line in ended.stderr.splitlines() if "could not be written" in line}
    assert line.startswith("error: the checkpoint of step 1 could not be written: rank ")
    assert "run/checkpoints/.tmp-step_0000001-" in line and ".distcp: File too large." in line
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert [record["kind"] for record in read_metrics(tmp_path / "run") if record["kind"] == "save"] == []


@pytest.mark.full
def test_a_command_killed_while_it_saves_leaves_nothing_half(stage_inputs: StageInputs, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    for _ in range(3):
        process = subprocess.Popen(
            command(*arguments(stage_inputs)),
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before, deadline = {path.name for path in folder.glob(".tmp-*")}, time.monotonic() + 200
        while not {path.name for path in folder.glob(".tmp-step_*")} - before:
            assert process.poll() is None and time.monotonic() < deadline, process.poll()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        for path in store.candidates(tmp_path / "run"):
            assert store.find_problems(path, checksums=True) == []
    ended = run(*arguments(stage_inputs), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in folder.iterdir()) == [f"step_000000{step}" for step in (4, 5, 6)]
    assert [record["step"] for record in read_metrics(tmp_path / "run") if record["kind"] == "train"] == [*range(1, 7)]
