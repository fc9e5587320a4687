"""What every opened source has in common: sizes that make a model, and an identity that changes with its files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from nemo_align.checkpoint.conversion.job import Settings, carry_out
from nemo_align.checkpoint.conversion.model import Model
from nemo_align.checkpoint.conversion.open_huggingface import open_huggingface
from nemo_align.checkpoint.conversion.to_megatron import to_megatron
from nemo_align.checkpoint.huggingface.model_config import hf_config
from nemo_align.checkpoint.huggingface.weight_map import weight_map
from nemo_align.checkpoint.streaming.tensors import HeldTensor
from nemo_align.config.model import ModelConfig
from tests.checkpoint_files import write_safetensors

SIZES = {
    "name": "tiny", "num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 4,
    "num_query_groups": 2, "head_dim": 4, "vocab_size": 400,
}  # fmt: skip


def write_hf(folder: Path, **changes: int) -> Path:
    """A Hugging Face folder of random weights."""
    config = ModelConfig(**(SIZES | changes))
    folder.mkdir()
    names = [
        (name, shape)
        for weight in weight_map(config, has_output_layer=True)
        for name, shape in zip(weight.hf, weight.hf_shapes, strict=True)
    ]
    write_safetensors(folder, {name: torch.randn(shape) for name, shape in names})
    values = hf_config(config, dtype="fp32", bos_id=1, eos_id=2, pad_id=0, reward=None)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_heads_that_groups_do_not_divide(tmp_path: Path) -> None:
    """The shapes agree, and still no order of the fused rows would be right."""
    folder = write_hf(tmp_path / "hf", num_query_groups=3)
    with pytest.raises(ValueError, match=r"config\.json describes no model: .*not divisible by num_key_value_heads 3"):
        open_huggingface(folder)


def test_more_layers_than_any_model_has(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"num_hidden_layers means 1,000,000,000 layers, at most 10,000 make sense"):
        open_huggingface(folder)


def test_number_formats_that_weights_do_not_come_in(tmp_path: Path) -> None:
    tensors = {"x": HeldTensor(torch.ones(2, dtype=torch.int32))}
    with pytest.raises(ValueError, match=r"somewhere: x is torch\.int32, only fp32, bf16, fp16 is read"):
        Model(
            kind="hf", path=Path("somewhere"), config=ModelConfig(**SIZES), reward=None, tensors=tensors,
            tokenizer=None, identity="",
        )  # fmt: skip


@pytest.mark.parametrize("name", ["tokenizer.model", "config.json", "model.safetensors", "conversion.json"])
def test_a_source_that_changed_is_another_one(name: str, tokenizer: bytes, tmp_path: Path) -> None:
    """What was made of the old one is not taken for its result."""
    folder = write_hf(tmp_path / "hf")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    record = {"format": 1, "job": "", "source": {}, "files": {}}
    (folder / "conversion.json").write_text(json.dumps(record))

    def convert() -> bool:
        model = open_huggingface(folder)
        return carry_out([model], to_megatron(model), tmp_path / "out", Settings(workers=1))

    assert convert() and not convert()
    os.utime(folder / name, ns=(1, 1))
    with pytest.raises(ValueError, match="out exists already"):
        convert()


def test_a_disk_without_room_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_huggingface(write_hf(tmp_path / "hf"))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"total": 10**9, "free": 10**6}))
    with pytest.raises(ValueError, match=r"the target needs \d+,\d+,\d+ bytes \(0\.\d GB\), and .* has 1,000,000"):
        carry_out([model], to_megatron(model), tmp_path / "out", Settings(workers=1))
    assert sorted(tmp_path.iterdir()) == before


def test_a_target_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_huggingface(write_hf(tmp_path / "hf"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"target=.*file/out cannot be written"):
        carry_out([model], to_megatron(model), tmp_path / "file" / "out", Settings(workers=1))
    target = to_megatron(model)
    monkeypatch.setattr(target, "write_small", lambda folder: (folder / "no" / "such").write_bytes(b""))
    with pytest.raises(ValueError, match=r"no/such: No such file or directory\. What is done is kept"):
        carry_out([model], target, tmp_path / "out", Settings(workers=1))
