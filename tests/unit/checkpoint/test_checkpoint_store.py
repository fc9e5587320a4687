"""Run directories: what is whole, publishing, retention, finding a checkpoint by path. No torch."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import pytest

from nemo_align.checkpoint import manifest as manifests
from nemo_align.checkpoint import store
from tests.unit.checkpoint.published import ENTRIES, publish


def steps(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in store.candidates(run_dir)]


def test_a_published_checkpoint_is_the_newest_and_described(tmp_path: Path) -> None:
    for step in (5, 20):
        path = publish(tmp_path, step, content=b"abc")
    assert store.newest_complete(tmp_path) == path == tmp_path / "checkpoints" / "step_0000020"
    files = store.read_manifest(path)["files"]
    assert files["sub/data"] == {
        "bytes": 3,
        # printf abc | b3sum
        "blake3": "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
    }
    assert set(files) == {"metadata.json", "sub/data"}


def test_no_checkpoint(tmp_path: Path) -> None:
    assert store.newest_complete(tmp_path) is None
    assert store.newest_complete(tmp_path / "nowhere") is None


def edit(path: Path, change) -> None:
    """What a flipped bit may do to a manifest: it stays JSON."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def flip(path: Path) -> None:
    content = bytearray((path / "sub" / "data").read_bytes())
    content[3] ^= 1
    (path / "sub" / "data").write_bytes(content)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (flip, "checksum differs"),
        (lambda path: os.truncate(path / "sub" / "data", 3), "has 3 bytes, 7 expected"),
        (lambda path: (path / "sub" / "data").unlink(), "sub/data is missing"),
        (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"format": 1'), "is not JSON"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "is not JSON"),
        (lambda path: (path / "manifest.json").write_text("[]"), "holds list"),
        (lambda path: (path / "manifest.json").write_text('{"format": 1}'), "format is 1, this version reads 2"),
        (lambda path: (path / "manifest.json").write_text('{"format": 2}'), "lacks verb, step"),
        (lambda path: edit(path, lambda manifest: manifest["state"].update(step=41)), "its own checksum differs"),
        (lambda path: edit(path, lambda manifest: manifest["state"].update(stap=manifest["state"].pop("step"))), "own"),
    ],
)
def test_damage_falls_back_with_a_warning(
    damage, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = publish(tmp_path, 1), publish(tmp_path, 2, state={"step": 2})
    damage(bad)
    with caplog.at_level(logging.WARNING, "nemo_align"):
        assert store.newest_complete(tmp_path) == good
    assert "step_0000002 is damaged and skipped" in caplog.text and reason in caplog.text


def failing(*_: object, **__: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize(
    "what", ["nemo_align.checkpoint.checksums.open", "pathlib.Path.stat", "pathlib.Path.read_bytes"]
)
def test_a_disk_that_fails_is_no_damage(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it taken for damage, the run would go back and the next save would delete what it could not read."""
    publish(tmp_path, 1)
    newest = publish(tmp_path, 2)
    found = store.candidates(tmp_path)
    monkeypatch.setattr(store, "candidates", lambda _: found)
    monkeypatch.setattr(what, failing, raising=False)
    with pytest.raises(ValueError, match=rf"{newest}/\S+ cannot be read: Input/output error. That may pass"):
        store.newest_complete(tmp_path)


def test_sizes_alone_do_not_see_a_flipped_bit(tmp_path: Path) -> None:
    path = publish(tmp_path, 1)
    flip(path)
    assert store.newest_complete(tmp_path, checksums=False) == path
    assert store.newest_complete(tmp_path) is None


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b"])
def test_a_manifest_cannot_point_outside(name: str, tmp_path: Path) -> None:
    path = publish(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "blake3": "0" * 64}
    (path / "manifest.json").write_text(json.dumps(manifests.signed(manifest)))
    with pytest.raises(ValueError, match="leaves the checkpoint's folder"):
        manifests.read_manifest(path)


def test_a_manifest_holds_no_nan(tmp_path: Path) -> None:
    folder = store.begin(tmp_path, 1)
    with pytest.raises(ValueError):
        manifests.write_manifest(folder, {**ENTRIES, "step": 1, "files": {}, "state": {"loss": float("nan")}})


def test_leftovers_of_crashes_go_at_the_next_save(tmp_path: Path) -> None:
    crashed = store.begin(tmp_path, 1)
    (crashed / "part").write_bytes(b"x")
    assert store.newest_complete(tmp_path) is None
    publish(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000002"]


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    publish(tmp_path, 3, content=b"old")
    path = publish(tmp_path, 3, final=True, content=b"new")
    assert (path / "sub" / "data").read_bytes() == b"new"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0000003"]


def test_dying_between_the_renames_of_a_replacement_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish(tmp_path, 3, content=b"old")
    rename = os.rename

    def die_at_the_second(source: object, target: object) -> None:
        if Path(target).name == "step_0000003":
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            publish(tmp_path, 3, content=b"new")
    newest = store.newest_complete(tmp_path)
    assert newest is not None and (newest / "sub" / "data").read_bytes() == b"old"
    publish(tmp_path, 4)
    assert (path / "sub" / "data").read_bytes() == b"old"
    assert steps(tmp_path) == [4, 3]


def test_retention_keeps_final_ones_and_the_last_periodic(tmp_path: Path) -> None:
    for step in range(1, 7):
        publish(tmp_path, step, final=step == 2)
    deleted = store.apply_retention(tmp_path, 2)
    assert steps(tmp_path) == [6, 5, 2]
    assert sorted(path.name for path in deleted) == ["step_0000001", "step_0000003", "step_0000004"]


@pytest.mark.parametrize("keep_last", [0, 1])
def test_retention_never_deletes_the_last_good_one(keep_last: int, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        publish(tmp_path, step)
    os.truncate(tmp_path / "checkpoints" / "step_0000003" / "sub" / "data", 1)
    store.apply_retention(tmp_path, keep_last)
    assert steps(tmp_path) == [3, 2]
    assert store.newest_complete(tmp_path) == store.checkpoint_path(tmp_path, 2)
    publish(tmp_path, 4)
    store.apply_retention(tmp_path, keep_last)
    assert steps(tmp_path) == [4]


def test_what_a_fallback_skipped_counts_for_nothing(tmp_path: Path) -> None:
    """Step 9's bytes changed at their length: the run went on from 5, and its next save is worth more than 9."""
    for step in (2, 5, 9):
        publish(tmp_path, step)
    (tmp_path / "checkpoints" / "step_0000009" / "sub" / "data").write_bytes(b"WEIGHTS")
    assert store.newest_complete(tmp_path) == store.checkpoint_path(tmp_path, 5)
    path = publish(tmp_path, 7)
    store.apply_retention(tmp_path, 2, published=path)
    assert steps(tmp_path) == [7, 5]
    assert store.newest_complete(tmp_path) == path


def test_a_final_checkpoint_leaves_the_last_periodic_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        publish(tmp_path, step)
    path = publish(tmp_path, 4, final=True)
    store.apply_retention(tmp_path, 1, published=path)
    assert steps(tmp_path) == [4, 3]


def test_space_is_asked_for_before_a_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        store.begin(tmp_path, 3, num_bytes=1 << 60)
    message = str(caught.value)
    assert message.startswith("the next checkpoint needs 1,152,921,504,606,846,976 bytes (1152921504.61 GB), and ")
    assert f"{tmp_path}/checkpoints has " in message and "GB) free: make room there" in message
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the run directory should be")
    with pytest.raises(ValueError) as caught:
        store.begin(tmp_path / "run", 3)
    expected = f"the checkpoint of step 3 cannot be written: {tmp_path}/run/checkpoints: Not a directory"
    assert str(caught.value) == expected


def test_what_a_killed_save_left_is_removed_and_what_it_replaced_put_back(tmp_path: Path) -> None:
    path = publish(tmp_path, 3)
    left = store.begin(tmp_path, 4)
    for file in path.rglob("*"):  # killed right before the rename: the folder looks whole
        if file.is_file():
            (left / file.name).write_bytes(file.read_bytes())
    os.rename(path, path.with_name(path.name + store.REPLACED))
    store.tidy(tmp_path)
    assert [child.name for child in (tmp_path / "checkpoints").iterdir()] == ["step_0000003"]
    store.tidy(tmp_path / "nowhere")


def test_resolve_takes_run_checkpoint_and_hf_folders(tmp_path: Path) -> None:
    path = publish(tmp_path / "run", 7)
    for given in (tmp_path / "run", tmp_path / "run" / "checkpoints", path, str(path)):
        found = store.resolve(given)
        assert (found.kind, found.path, found.manifest["step"]) == ("megatron", path, 7)
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\0" * 8)
    assert store.resolve(folder) == store.CheckpointReference("hf", folder, None)


def test_resolve_says_what_is_there_instead(tmp_path: Path) -> None:
    (tmp_path / "runs" / "base").mkdir(parents=True)
    (tmp_path / "runs" / "sft").mkdir()
    with pytest.raises(ValueError, match=r"runs, which holds base, sft$"):
        store.resolve(tmp_path / "runs" / "sff" / "checkpoints")
    with pytest.raises(ValueError, match=r"not a run directory .* it holds base, sft"):
        store.resolve(tmp_path / "runs")
    publish(tmp_path / "runs" / "sft", 1)
    os.truncate(tmp_path / "runs" / "sft" / "checkpoints" / "step_0000001" / "sub" / "data", 1)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        store.resolve(tmp_path / "runs" / "sft")
    with pytest.raises(ValueError, match="is damaged: sub/data has 1 bytes, 7 expected"):
        store.resolve(tmp_path / "runs" / "sft" / "checkpoints" / "step_0000001")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model.bin.*pickled weights are not read"):
        store.resolve(tmp_path / "hf")


def test_the_hash_follows_the_weights(tmp_path: Path) -> None:
    first = store.manifest_hash(publish(tmp_path / "a", 1))
    assert store.manifest_hash(publish(tmp_path / "b", 1)) == first
    assert store.manifest_hash(publish(tmp_path / "c", 1, content=b"weightt")) != first
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    header = b'{"a": 1}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0123")
    first = store.manifest_hash(folder)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0124")
    assert store.manifest_hash(folder) != first


def test_the_store_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, nemo_align.checkpoint.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
