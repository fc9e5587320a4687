"""Secrets in the environment reach no file of a run and no output, whether the run succeeds or fails."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.commands import command, environment
from tests.stage_inputs import MODEL, StageInputs, stage_overrides

SECRETS = {
    name: f"canary{number}-7c1e94d0b3"
    for number, name in enumerate(
        ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "DATABASE_URL")
    )
}
TRACKERS = [name for name in ("tensorboard", "wandb") if importlib.util.find_spec(name)]  # extra `tracking`


def run(arguments: list[str], cwd: Path, **more: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env={**environment(), **SECRETS, **more},
        capture_output=True,
        timeout=300,
        check=False,
    )


def leaks(folder: Path, done: subprocess.CompletedProcess[bytes]) -> list[str]:
    places = {"stdout": done.stdout, "stderr": done.stderr}
    files = [path for path in folder.rglob("*") if path.is_file()]
    places |= {str(path.relative_to(folder)): path.read_bytes() for path in files}
    places |= {f"name of {path.relative_to(folder)}": str(path.relative_to(folder)).encode() for path in files}
    return [
        f"{name} in {place}"
        for place, content in places.items()
        for name, value in SECRETS.items()
        if value.encode() in content
    ]


def test_a_run_and_its_export(stage_inputs: StageInputs, tmp_path: Path) -> None:
    arguments = ["sft", *MODEL, *stage_overrides(stage_inputs, "sft"), "run_dir=run", "parallel.data=2"]
    arguments += ["train.max_steps=1", "checkpoint.export_hf=true", *(f"tracking.{name}=true" for name in TRACKERS)]
    done = run(arguments, tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr.decode()
    deadline = time.monotonic() + 30  # W&B's own process may write its file after the run has ended
    while "wandb" in TRACKERS and not list((tmp_path / "run").rglob("*.wandb")) and time.monotonic() < deadline:
        time.sleep(0.2)
    names = {path.name for path in (tmp_path / "run").rglob("*")}
    assert {"config.yaml", "log.txt", "metrics.jsonl", "result.json", "rank_1.txt", "model.safetensors"} <= names
    assert "tensorboard" not in TRACKERS or any(name.startswith("events.out.tfevents") for name in names)
    assert "wandb" not in TRACKERS or any(name.endswith(".wandb") for name in names)
    assert not leaks(tmp_path, done)


@pytest.mark.parametrize("failure", [pytest.param("user", marks=pytest.mark.full), "crash"])
def test_a_run_that_fails(failure: str, stage_inputs: StageInputs, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user"}]}\n')
    arguments = ["sft", *MODEL, *stage_overrides(stage_inputs, "sft"), "run_dir=run", "parallel.data=2"]
    if failure == "user":
        done = run([*arguments, f"data.train.rows.path={rows}"], tmp_path)
        assert done.returncode == 2 and b"rows.jsonl:1" in done.stderr
    else:  # a module that the workers import raises: the traceback of every rank, with its stack, goes to the logs
        broken = tmp_path / "broken" / "sentencepiece"
        broken.mkdir(parents=True)
        (broken / "__init__.py").write_text("def SentencePieceProcessor(**_):\n    raise OSError('no such device')\n")
        path = f"{tmp_path / 'broken'}:{environment()['PYTHONPATH']}"
        done = run(arguments, tmp_path, PYTHONPATH=path, PYTHONFAULTHANDLER="1")
        assert done.returncode not in (0, 2) and b"no such device" in done.stderr and b"Traceback" in done.stderr
    assert not leaks(tmp_path, done)


@pytest.mark.full
def test_a_sweep_writes_no_environment(stage_inputs: StageInputs, tmp_path: Path) -> None:
    """Hydra's own file of a sweep, multirun.yaml, holds its whole configuration."""
    arguments = ["sft", *MODEL, *stage_overrides(stage_inputs, "sft"), "data.sequence_length=0,-1", "--multirun"]
    done = run([*arguments, "run_dir=run"], tmp_path)
    assert done.returncode != 0 and list(tmp_path.rglob("multirun.yaml"))
    assert not leaks(tmp_path, done)


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    script = "import os; print(os.environ['HF_TOKEN']); open('x', 'w').write(os.environ['MY_PASSWORD'])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**environment(), **SECRETS}, capture_output=True, check=True
    )
    assert leaks(tmp_path, done) == ["HF_TOKEN in stdout", "MY_PASSWORD in x"]
