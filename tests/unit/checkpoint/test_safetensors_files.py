"""Our streaming safetensors writer and the reader, against the safetensors package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_align.checkpoint.streaming.safetensors import SafetensorsFolder
from tests.checkpoint_files import write_safetensors

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.randn(5, 7).bfloat16(),
    "c": torch.randn(3, 4, 2).transpose(0, 2),  # not contiguous
}


@pytest.mark.parametrize("most, files", [(10**9, 1), (100, 2), (1, 3)])
def test_shards(most: int, files: int, tmp_path: Path) -> None:
    write_safetensors(tmp_path, TENSORS, most)
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == files
    assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)
    loaded = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert loaded.keys() == TENSORS.keys()
    folder = SafetensorsFolder(tmp_path)
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor)
        assert folder.shape(name) == tuple(tensor.shape)
    assert torch.equal(folder.stored("b").read_box(slice(1, 3), slice(2, 7)), TENSORS["b"][1:3, 2:7])
    if files > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 6 * 4 + 35 * 2 + 24 * 4


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        SafetensorsFolder(tmp_path)
    write_safetensors(tmp_path, TENSORS, 1)
    path = tmp_path / "model-00002-of-00003.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(ValueError, match=r"00002-of-00003\.safetensors is not a whole safetensors file"):
        SafetensorsFolder(tmp_path)
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="lacks b, which"):
        SafetensorsFolder(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"names model-00002-of-00003\.safetensors, which is not in the folder"):
        SafetensorsFolder(tmp_path)
