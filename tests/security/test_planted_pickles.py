"""A pickle planted where a run looks is never opened: nothing of it runs, and the message names the file."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from nemo_align.checkpoint import store
from nemo_align.checkpoint.conversion.convert import convert
from nemo_align.checkpoint.safe_reading import read_metadata
from nemo_align.checkpoint.streaming.torch_dist import TensorReader
from nemo_align.checkpoint.torch_dist import read_common
from nemo_align.config.compose import ConfigError, compose
from nemo_align.config.conversion import ConvertConfig
from nemo_align.config.data import BlendSourceConfig, RowsConfig
from nemo_align.data import pretraining
from nemo_align.data.rows import read_rows
from nemo_align.data.step_plan import StepLayout
from nemo_align.data.tokenized_rows import TokenizedRows, open_or_build
from nemo_align.data.tokenizer import load_tokenizer
from nemo_align.training.example_cache import ExampleCache
from tests.checkpoint_files import write_torch_dist
from tests.security import planted
from tests.stage_inputs import MODEL, StageInputs, stage_overrides


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that must never appear."""
    return tmp_path / "canary"


@pytest.mark.parametrize("kind", planted.PICKLES)
def test_the_payloads_work(kind: str, canary: Path) -> None:
    """Without limits each of them runs, so the tests below test something."""
    content = planted.PICKLES[kind](canary)
    path = canary.with_name("payload")
    path.write_bytes(content)
    if "torch" in kind:
        torch.load(path, weights_only=False)
    else:
        np.load(path, allow_pickle=True)
    assert canary.exists()


# Weights


@pytest.mark.parametrize("name", planted.ARCHIVES)
def test_archives_and_pickled_weights_are_not_opened(
    name: str, canary: Path, stage_inputs: StageInputs, tmp_path: Path
) -> None:
    path = tmp_path / "downloads" / name
    path.parent.mkdir()
    path.write_bytes(planted.ARCHIVES[name](canary))
    before = sorted(tmp_path.rglob("*"))
    refused = re.escape(str(path)) + " is a file: archives .* are not opened"
    arguments = [MODEL[1], *stage_overrides(stage_inputs, "sft"), f"checkpoint.init_from={path}"]
    with pytest.raises(ConfigError, match=refused):
        compose("sft", arguments)
    with pytest.raises(ValueError, match=refused):
        store.resolve(path)
    config = ConvertConfig(source=str(path), target=str(tmp_path / "out"), source_format="hf", target_format="megatron")
    with pytest.raises(ValueError, match=refused):
        convert(config)
    assert sorted(tmp_path.rglob("*")) == before and not canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "adapter_model.bin"])
def test_a_hugging_face_folder_of_pickles_is_refused(name: str, canary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "nemotron"}')
    (folder / name).write_bytes(planted.torch_file(canary))
    with pytest.raises(ValueError, match=r"hf is a Hugging Face folder without \.safetensors"):
        store.resolve(folder)
    assert not canary.exists()


def test_an_unpacked_nemo_folder_is_refused(canary: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unpacked"
    (folder / "model_weights").mkdir(parents=True)
    (folder / "model_config.yaml").write_text("!!python/object/apply:pathlib.Path.touch [x]\n")
    for name in (".metadata", "common.pt", "metadata.json"):
        (folder / "model_weights" / name).write_bytes(planted.raw(canary))
    for path in (folder, folder / "model_weights"):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            store.resolve(path)
    assert not canary.exists()


@pytest.mark.parametrize("kind", planted.PICKLES)
def test_a_distributed_checkpoint_read_for_conversion(kind: str, canary: Path, tmp_path: Path) -> None:
    """Loading into a run is tested with process groups, in test_checkpoint_weights."""
    content = planted.PICKLES[kind](canary)
    write_torch_dist(tmp_path, {"weight": torch.ones(4)})
    metadata = read_metadata(tmp_path)
    (place,) = metadata.storage_data.values()
    place.offset, place.length = 0, len(content)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    (tmp_path / place.relative_path).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{place.relative_path} is refused at weight"):
        TensorReader(tmp_path).read("weight")
    (tmp_path / "common.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"common\.pt is refused"):
        read_common(tmp_path)
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata is refused"):
        TensorReader(tmp_path)
    assert not canary.exists()


# Data and caches


def source(inputs: StageInputs, cache: Path) -> pretraining.PretrainingSource:
    blend = {"a": BlendSourceConfig(path=str(inputs.blend), weight=1.0)}
    return pretraining.PretrainingSource(
        [pretraining.PretrainingPhase("only", blend, 20)],
        tokenizer=load_tokenizer(inputs.tokenizer),
        seed=7,
        cache_dir=cache,
        layout=StepLayout(capacity=16),
        data_rank=0,
    )


@pytest.mark.parametrize("kind", planted.PICKLES)
def test_indices_of_megatron_core(
    kind: str, canary: Path, stage_inputs: StageInputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = source(stage_inputs, tmp_path / "cache").window(3)
    indices = sorted((tmp_path / "cache").rglob("*.npy"))
    assert len(indices) == 3  # of documents, samples and their order
    for path in indices:
        path.write_bytes(planted.PICKLES[kind](canary))
    logging.getLogger("nemo_align").propagate = True
    assert np.array_equal(source(stage_inputs, tmp_path / "cache").window(3), expected)  # built again
    assert all(str(path) in caplog.text for path in indices)
    assert not canary.exists()


def test_an_index_swapped_after_the_check(
    canary: Path, stage_inputs: StageInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(stage_inputs, tmp_path / "cache")
    for path in (tmp_path / "cache").rglob("*.npy"):
        path.write_bytes(planted.raw(canary))
    monkeypatch.setattr(pretraining, "_drop_damaged", lambda cache: None)
    with pytest.raises(ValueError, match=r"\.npy holds no plain numbers .*delete it, it is built again"):
        source(stage_inputs, tmp_path / "cache")
    assert not canary.exists()


def rows_cache(folder: Path) -> TokenizedRows:
    def build(writer) -> dict[str, int]:
        writer.add([([1, 2, 3], [False, True, True])], origin=(0, 1), targets={"labels": [1.0, 2.0]})
        return Counter(rows=1, kept=1)

    return open_or_build(
        folder, kind="reward", fingerprint="a" * 32, segments=1, build=build, sources=["x"], targets={"labels": 2}
    )


@pytest.mark.parametrize("kind", planted.PICKLES)
@pytest.mark.parametrize("name", ["tokens", "loss_mask", "offsets", "loss_tokens", "origins", "target_labels"])
def test_the_cache_of_tokenized_rows(name: str, kind: str, canary: Path, tmp_path: Path) -> None:
    path = rows_cache(tmp_path).folder / f"{name}.npy"
    path.write_bytes(planted.PICKLES[kind](canary))
    with pytest.raises(ValueError, match=re.escape(f"{path} holds no plain numbers") + ".*delete the folder"):
        rows_cache(tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["npz", *planted.PICKLES])
def test_the_cache_of_reference_log_probabilities(
    kind: str, canary: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("chosen", "rejected")
    arguments = {"kind": "reference", "identity": {"checkpoint": "x"}, "layout": {"data": 1}, "names": names}
    cache = ExampleCache(tmp_path, **arguments)
    cache.add([b"0" * 16], {name: np.ones(1) for name in names}, write=True)
    cache.flush()
    (part,) = tmp_path.rglob("part_*.npz")
    content = planted.npz_archive(canary, ("fingerprints", *names)) if kind == "npz" else planted.PICKLES[kind](canary)
    part.write_bytes(content)
    logging.getLogger("nemo_align").propagate = True
    assert ExampleCache(tmp_path, **arguments).load() == 0  # computed again
    assert str(part) in caplog.text and not canary.exists()


def saved_dataset(folder: Path) -> Path:
    datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("kind", planted.PICKLES)
@pytest.mark.parametrize("name", ["*.arrow", "state.json", "dataset_info.json"])
def test_a_folder_of_datasets(name: str, kind: str, canary: Path, tmp_path: Path) -> None:
    folder = saved_dataset(tmp_path / "rows")
    (path,) = folder.glob(name)
    path.write_bytes(planted.PICKLES[kind](canary))
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        list(read_rows(RowsConfig(path=str(folder)), seed=0))
    assert not canary.exists()


def test_a_folder_of_datasets_that_names_other_files(canary: Path, tmp_path: Path) -> None:
    folder = saved_dataset(tmp_path / "rows")
    (arrow,) = folder.glob("*.arrow")
    (tmp_path / "outside.arrow").write_bytes(arrow.read_bytes())
    state = json.loads((folder / "state.json").read_text())
    for name in ("../outside.arrow", str(tmp_path / "outside.arrow")):
        (folder / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))
        with pytest.raises(ValueError, match=r"state\.json: .*outside\.arrow lies outside of the folder"):
            list(read_rows(RowsConfig(path=str(folder)), seed=0))


def test_columns_that_would_open_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    datasets.Dataset.from_dict({"image": [None]}, features=datasets.Features({"image": datasets.Image()})).save_to_disk(
        str(folder)
    )
    with pytest.raises(ValueError, match="column image is of type Image"):
        list(read_rows(RowsConfig(path=str(folder)), seed=0))


@pytest.mark.parametrize("kind", planted.PICKLES)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet"])
def test_files_of_rows(name: str, kind: str, canary: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(planted.PICKLES[kind](canary))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        list(read_rows(RowsConfig(path=str(tmp_path / name)), seed=0))
    assert not canary.exists()


@pytest.mark.parametrize("kind", planted.PICKLES)
def test_a_tokenizer_that_is_a_pickle(kind: str, canary: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(planted.PICKLES[kind](canary))
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_bytes(planted.PICKLES[kind](canary))
    with pytest.raises(ValueError, match=re.escape(f"cannot load {tmp_path}")):
        load_tokenizer(tmp_path)
    assert not canary.exists()
