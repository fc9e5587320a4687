"""Names in files from outside lead nowhere else, counts in them reserve no memory, and reports escape them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_align.checkpoint import manifest as manifests
from nemo_align.checkpoint import store
from nemo_align.checkpoint.streaming.safetensors import SafetensorsFolder
from nemo_align.config import initial_model
from nemo_align.config.compose import ConfigError, compose
from nemo_align.pipeline.manifest import Manifest, StageRecord
from nemo_align.pipeline.report import write_report
from nemo_align.training.metrics import MetricsWriter
from nemo_align.training.result import StageResult, write_result
from tests.stage_inputs import MODEL, StageInputs, stage_overrides

OUTSIDE = ["../elsewhere", "/etc/passwd", "a/../../b", "..", "checkpoints/../../../x"]


def described(**changes: object) -> dict:
    entry = dict.fromkeys(manifests.REQUIRED_KEYS)
    return entry | {"format": manifests.FORMAT, "files": {}, "final": False} | changes


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_nothing_outside(name: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    for changes in ({"files": {name: {"bytes": 1, "blake3": "0" * 64}}}, {"tokenizer": name}):
        path.write_text(json.dumps(described(**changes)))
        with pytest.raises(ValueError, match=re.escape(f"{path}: file name {name!r} leaves the checkpoint's folder")):
            manifests.read_manifest(tmp_path)


@pytest.mark.parametrize("name", [*OUTSIDE, ["x"], 7])
def test_the_tokenizer_of_a_checkpoint_lies_in_it(name: object, tmp_path: Path) -> None:
    import dataclasses

    from nemo_align.config.model import ModelConfig

    model = {field.name: 1 for field in dataclasses.fields(ModelConfig)}
    (tmp_path / "manifest.json").write_text(json.dumps({"model": model, "tokenizer": name}))
    with pytest.raises(ConfigError, match="leaves the checkpoint's folder"):
        initial_model.read(tmp_path)


HEX = "0" * 64
ENTRIES = [
    {"bytes": "1", "blake3": HEX},
    {"bytes": 1, "blake3": HEX[1:]},
    {"bytes": 1, "md5": HEX},
    {"bytes": 1, "blake3": HEX, "sha256": HEX},
    {"bytes": 2, "blake3": [[1, HEX]]},
    {"bytes": 2, "blake3": [[2, HEX], [2, HEX]]},
    {"bytes": 2, "blake3": [[-1, HEX], [2, HEX]]},
    {"bytes": True, "blake3": HEX},
]


@pytest.mark.parametrize("files", [[], "x", 3, {"a": 1}, *({"a": entry} for entry in ENTRIES)])
def test_a_manifest_of_another_shape(files: object, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(described(files=files)))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "manifest.json"))):
        manifests.read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../other", "/tmp/other", "a/../../b"])
def test_experiments_stay_below_runs(name: str, stage_inputs: StageInputs) -> None:
    with pytest.raises(ConfigError, match=r"use a name without \.\. or a leading"):
        compose("sft", [*MODEL, *stage_overrides(stage_inputs, "sft"), f"experiment={name}"])


@pytest.mark.parametrize("name", ["../other", "a/b", "..", ".hidden"])
def test_names_that_become_files_or_folders(name: str, stage_inputs: StageInputs, tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    inputs = json.dumps({"inputs": {name: str(stage_inputs.rows("pairs"))}})
    stages = json.dumps({"stages": {name: {"verb": "sft"}}})
    for verb, text in (("score", inputs), ("pipeline", stages)):
        (tmp_path / "mine" / "experiment" / f"{verb}_theirs.yaml").write_text(f"# @package _global_\n{text}\n")
        monkey = pytest.MonkeyPatch()
        monkey.setenv("NEMO_ALIGN_CONFIG_DIR", str(tmp_path / "mine"))
        try:
            with pytest.raises(ConfigError, match=r"the name becomes a (file|folder)|is missing"):
                compose(verb, [f"+experiment={verb}_theirs"], check_files=False)
        finally:
            monkey.undo()


def test_retention_and_leftovers_do_not_follow_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    folder = tmp_path / "run" / store.CHECKPOINTS
    folder.mkdir(parents=True)
    (folder / f"{store.TEMPORARY}step_0000001-aaaa").symlink_to(outside)
    (folder / "step_0000001").symlink_to(outside)
    store.begin(tmp_path / "run", 2)
    store.apply_retention(tmp_path / "run", keep_last=1)
    assert (outside / "precious").exists()


# Safetensors


def hf_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("header", [1 << 62, (1 << 64) - 1, 200_000_000, 1 << 20])
def test_a_header_of_absurd_length_reserves_nothing(header: int, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    path = folder / "model.safetensors"
    with open(path, "r+b") as stream:  # sparse: a file that is as long as it claims
        stream.write(header.to_bytes(8, "little"))
        stream.truncate(min(header, 1 << 36) + 8)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        SafetensorsFolder(folder).names()
    if header > 100_000_000:
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file: its header claims"):
            store.manifest_hash(folder)


@pytest.mark.parametrize(
    "index", [b"{", b"[]", b'{"weight_map": []}', b'{"weight_map": {"a": 3}}', b"\xff", b"[" * 10**5]
)
def test_a_damaged_index(index: bytes, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    (folder / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..", "sub/model.safetensors"])
def test_an_index_names_files_of_its_folder(name: str, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=r"which is not in the folder"):
        SafetensorsFolder(folder)


def test_weights_twice_in_a_folder(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    SafetensorsFolder(folder)
    hf_folder(folder)  # an older export that was not cleaned away
    with pytest.raises(ValueError, match=r"has both model\.safetensors and .* remove the stale one"):
        SafetensorsFolder(folder)


# The report

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>--><svg onload=alert(1)>"


def test_a_report_shows_names_as_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run_dir = tmp_path / "stage"
    metrics = {f"validation/{HOSTILE.replace('/', '')}/loss": 1.0}
    writer = MetricsWriter(run_dir)
    for step in (1, 2):
        writer.write({"kind": "train", "step": step, "loss": 1.0 / step})
        writer.write({"kind": "validation", "step": step, **metrics})
    writer.close()
    layout = {"tensor": 1, "pipeline": 1, "data": 1, "sequence": False, "world_size": 1}
    result = StageResult(
        verb="sft", experiment=HOSTILE, steps=2, seconds=2.0, train_seconds=1.0, layout=layout,
        input=HOSTILE, output=HOSTILE, first=metrics, last=metrics, mfu=0.1, peak_tflops=1.0, peak_source=HOSTILE,
    )  # fmt: skip
    write_result(run_dir, result)
    record = StageRecord(name=HOSTILE, verb="sft", run_dir=str(run_dir), seconds=2.0)
    record.finish(result)
    record.config_hash = HOSTILE
    page = write_report(tmp_path, Manifest(recipe=HOSTILE, stages=[record])).read_text()
    for tag in ("<script", "<img", "<svg onload"):
        assert tag not in page.lower()
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=[\"']?(https?:|//|javascript:)", page)
