"""One run directory, one configuration: what may differ when a run goes on."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemo_align.config.compose import load_resolved, to_yaml
from nemo_align.config.errors import ConfigError
from nemo_align.config.run_directory import claim, differences, exclusive, wait_for
from nemo_align.config.stages import SftStageConfig


def _text(**changes):
    config = SftStageConfig(experiment="x")
    for key, value in changes.items():
        *sections, name = key.split("__")
        node = config
        for section in sections:
            node = getattr(node, section)
        setattr(node, name, value)
    return to_yaml(config)


def test_the_same_command_again(tmp_path):
    assert claim("sft", tmp_path / "run", _text()) == []
    assert claim("sft", tmp_path / "run", _text()) == []


def test_other_weights_are_refused_with_every_key(tmp_path):
    claim("sft", tmp_path, _text(optimizer__lr=1e-5, train__global_batch_size=8))
    with pytest.raises(ConfigError) as caught:
        claim("sft", tmp_path, _text(optimizer__lr=2e-5, train__global_batch_size=8, precision__dtype="fp32"))
    for line in ("optimizer.lr: 1e-05 -> 2e-05", "precision.dtype: bf16 -> fp32", "Choose another run_dir"):
        assert line in str(caught.value)
    assert "global_batch_size" not in str(caught.value)
    assert "lr: 1.0e-05" in (tmp_path / "config.yaml").read_text()  # untouched


def test_another_verb_is_refused(tmp_path):
    claim("reward", tmp_path, _text())
    with pytest.raises(ConfigError, match="belongs to a run of `nemo-align reward`"):
        claim("sft", tmp_path, _text())


@pytest.mark.parametrize(
    "key, value", [("checkpoint__keep_last", 5), ("tracking__wandb", True), ("train__log_every", 9)]
)
def test_what_no_weight_depends_on_changes_silently(tmp_path, key, value):
    claim("sft", tmp_path, _text())
    assert claim("sft", tmp_path, _text(**{key: value})) == []
    assert str(value).lower() in (tmp_path / "config.yaml").read_text()


def test_another_layout_is_noted(tmp_path):
    claim("sft", tmp_path, _text())
    assert claim("sft", tmp_path, _text(parallel__tensor=2)) == [("parallel.tensor", 1, 2)]


def test_max_steps_only_where_the_verb_says_so(tmp_path):
    claim("sft", tmp_path, _text(train__max_steps=5))
    with pytest.raises(ConfigError, match=r"train.max_steps: 5 -> 9"):
        claim("sft", tmp_path, _text(train__max_steps=9))
    assert claim("sft", tmp_path, _text(train__max_steps=9), ["train.max_steps"]) == []


def test_keys_of_a_table_come_and_go():
    assert differences("a: {b: 1}", "a: {}") == [("a", "absent", {}), ("a.b", 1, "absent")]


def test_an_unwritable_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        claim("sft", tmp_path / "file" / "run", _text())


def test_one_command_at_a_time(tmp_path):
    run_dir = tmp_path / "run"
    code = "import sys, pathlib; from nemo_align.config.run_directory import exclusive\n"
    code += "with exclusive(pathlib.Path(sys.argv[1])): print('holds', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout.readline() == b"holds\n"
        with pytest.raises(ConfigError, match=rf"another command \(process {other.pid} on .*\) runs in it") as refused:
            with exclusive(run_dir):
                raise AssertionError
        assert str(run_dir) in str(refused.value)
    finally:
        other.kill()
        other.wait()
    with exclusive(run_dir):  # a killed command holds nothing
        pass


def test_a_refused_command_leaves_nothing_behind(tmp_path):
    def refuse(run_dir: Path) -> None:
        with pytest.raises(ValueError, match="no"):
            with exclusive(run_dir):
                raise ValueError("no")

    refuse(tmp_path / "runs" / "recipe" / "mine")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept" / "checkpoints").mkdir(parents=True)
    refuse(tmp_path / "kept" / "new")
    refuse(tmp_path / "kept")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["checkpoints"]
    with exclusive(tmp_path / "kept"):  # what an earlier command left stays
        pass
    refuse(tmp_path / "kept")
    assert (tmp_path / "kept" / ".lock").exists()


def test_a_lock_that_was_taken_away_meanwhile_is_not_taken_for_one(tmp_path, monkeypatch):
    path, flock, opened = tmp_path / ".lock", fcntl.flock, []

    def flock_late(lock, operation):
        opened.append(lock.name)
        if len(opened) == 1:  # the command that held it is refused between our open() and our lock
            path.unlink()
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    with exclusive(tmp_path):
        with pytest.raises(ConfigError, match="is in use"), exclusive(tmp_path):
            raise AssertionError
    assert len(opened) == 3 and path.exists()


def test_a_folder_that_cannot_be_locked_is_used_with_a_note(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)  # as on Lustre mounted without flock
    with exclusive(tmp_path):
        pass
    assert "cannot be locked" in capsys.readouterr().err


def test_other_ranks_wait_for_rank_0(tmp_path):
    writer = threading.Thread(target=lambda: (time.sleep(0.3), claim("sft", tmp_path, _text())))
    writer.start()
    wait_for("sft", tmp_path, _text(), seconds=10)
    writer.join()
    assert load_resolved_error(tmp_path) is not None  # a config with missing values, but whole on disk
    with pytest.raises(ConfigError, match="differs from this rank's configuration"):
        wait_for("sft", tmp_path, _text(runtime__seed=5), seconds=0.2)


def load_resolved_error(run_dir):
    with pytest.raises(ConfigError) as caught:
        load_resolved("sft", run_dir / "config.yaml")
    return caught.value
