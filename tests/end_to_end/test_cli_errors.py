"""The command as a user types it: mistakes are refused fast, in one message, with the right suggestion."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "nemo_align.cli"]


def _run(arguments, cwd):
    """The finished command and the processor seconds that it took: on a busy machine the clock measures the others."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sft", "optimzer.lr=1e-4"], "unknown key 'optimzer.lr'; did you mean 'optimizer.lr'?"),
        (["sft", "++optimizer.lrr=1"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        (["sft", "+optimizer.lrr=1"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        (["sft", "model=tyni"], "did you mean 'tiny'?"),
        (["stf"], "did you mean 'sft'?"),
        (["sft"], "optimizer.lr is missing: peak learning rate (number). Example: optimizer.lr=3e-7"),
        (["sft", "model=tiny", "optimizer.lr=fast"], "optimizer.lr is 'fast', but must be a number"),
        (["reward", "--config-dir", ".", "+experiment=typo"], "typo.yaml:3"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "typo.yaml").write_text("# @package _global_\noptimizer:\n  learning_rate: 1\n")
    done, seconds = _run(arguments, tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert all(line.startswith("error: ") for line in done.stderr.splitlines())
    assert seconds < 2.0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments, limit, shown",
    [
        ([], 0.5, "Verbs:"),
        (["--help"], 0.5, "preference  "),
        (["--version"], 0.5, "nemo-align "),
        (["pretrain", "--help"], 1.0, "data.phases.<name>.blend.<name>.weight"),
        (["preference", "--help"], 1.0, "preference.ref_policy_kl_penalty"),
        (["pipeline", "--help"], 1.0, "stages.<name>.verb"),
        (["convert", "--help"], 1.0, "from"),
    ],
)
def test_help_is_fast(tmp_path, arguments, limit, shown):
    done, seconds = _run(arguments, tmp_path)
    assert done.returncode == 0 and shown in done.stdout
    assert seconds < limit


def test_help_into_a_closed_pipe(tmp_path):
    script = f"{' '.join(COMMAND)} sft --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[0].startswith("Usage: nemo-align sft")
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("option", [["--info", "defaults"], ["--cfg", "hydra"]])
def test_hydras_own_views(tmp_path, option):
    done, _ = _run(["sft", "model=tiny", "optimizer.lr=1", *option], tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("model/tiny" if option[0] == "--info" else "hydra:") in done.stdout
    assert list(tmp_path.iterdir()) == []  # Hydra leaves no folders of its own
