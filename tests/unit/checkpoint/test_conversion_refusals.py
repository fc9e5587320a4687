"""`convert` in one process: what it refuses, and what an export holds besides weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemo_align.checkpoint.conversion.convert import convert, export_hf, import_hf
from nemo_align.checkpoint.huggingface.model_config import hf_config
from nemo_align.checkpoint.huggingface.weight_map import weight_map
from nemo_align.checkpoint.store import read_manifest
from nemo_align.config.conversion import ConvertConfig
from nemo_align.config.model import ModelConfig
from tests.checkpoint_files import write_safetensors

MODEL = ModelConfig(
    name="tiny",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=4,
    vocab_size=11,
)


def write_hf(folder: Path, *, without: str = "", extra: str = "", dtype: torch.dtype = torch.float32) -> Path:
    """A folder of random weights without a tokenizer."""
    folder.mkdir()
    plan = [
        (name, dtype, shape)
        for weight in weight_map(MODEL, has_output_layer=True)
        for name, shape in zip(weight.hf, weight.hf_shapes, strict=True)
        if name != without
    ] + ([(extra, dtype, (1,))] if extra else [])
    write_safetensors(folder, {name: torch.randn(shape).to(dtype) for name, _, shape in plan})
    config = hf_config(MODEL, dtype="fp32", bos_id=1, eos_id=2, pad_id=0, reward=None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def settings(source: Path, target: Path, **changes: str) -> ConvertConfig:
    formats = {"source_format": "hf", "target_format": "megatron"} | changes
    return ConvertConfig(source=str(source), target=str(target), **formats)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"source_format": "zip"}, "is a hf checkpoint, but from=zip"),
        ({"target_format": "hf"}, "from and to are both hf"),
        ({"dtype": "fp16"}, "dtype=fp16 is unknown: choose from fp32, bf16"),
        ({"source_format": "megatron", "target_format": "hf"}, "is a hf checkpoint, but from=megatron"),
    ],
)
def test_settings(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert(settings(write_hf(tmp_path / "hf"), tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_missing_and_unexpected_tensors_are_listed(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=rf"missing: {name} \(1 in all\)"):
        import_hf(write_hf(tmp_path / "a", without=name), tmp_path / "out")
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.0\.mlp\.gate_proj\.weight"):
        import_hf(write_hf(tmp_path / "b", extra="model.layers.0.mlp.gate_proj.weight"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("a", "b")] == []  # nothing half written


def test_a_target_that_exists_is_left_alone(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ValueError, match="exists already: remove it or name another target"):
        import_hf(source, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_half_precision_needs_a_choice(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", dtype=torch.float16)
    with pytest.raises(ValueError, match="holds F16 weights: set dtype=bf16 or dtype=fp32"):
        import_hf(source, tmp_path / "out")
    assert read_manifest(import_hf(source, tmp_path / "out", dtype="bf16"))["dtype"] == "bf16"


def test_an_export_tells_where_it_comes_from(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = import_hf(write_hf(tmp_path / "hf"), run_dir / "checkpoints" / "step_0000007")
    (run_dir / "config.yaml").write_text("optimizer:\n  lr: 3.0e-07\n")
    result = {"experiment": "tiny/sft", "steps": 7, "mfu": 0.41, "last": {"validation/main/loss": 1.25}}
    result["output"] = "checkpoints/step_0000007"
    (run_dir / "result.json").write_text(json.dumps(result))
    card = (export_hf(run_dir, tmp_path / "out") / "README.md").read_text()
    # 2 x 11 x 8 embeddings, 2 x (8 x 32 + 16 x 8 + 2 x 8 x 16) matrices, 2 x 5 x 8 norms.
    for line in (
        "| parameters | 1,536 |",
        "| MFU (real tokens) | 0.41 |",
        "| validation/main/loss (last) | 1.25 |",
        "lr: 3.0e-07",
    ):
        assert line in card, line
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[400] ^= 1  # among the values of the embedding: nothing but the checksum tells
    (path / "__0_0.distcp").write_bytes(content)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged"):
        export_hf(path, tmp_path / "again")
