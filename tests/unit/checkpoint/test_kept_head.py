"""reward_head.safetensors beside a reward model: taken where it is that model's, refused where the model moved on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemo_align.checkpoint.conversion.open_huggingface import open_huggingface
from nemo_align.checkpoint.conversion.to_huggingface import to_huggingface
from nemo_align.checkpoint.conversion.verify import verify_tensors
from nemo_align.checkpoint.huggingface import reward_head
from nemo_align.checkpoint.huggingface.model_config import hf_config
from nemo_align.checkpoint.huggingface.weight_map import FINAL_NORM_BIAS, HEAD_BIAS, HEAD_WEIGHT
from nemo_align.checkpoint.streaming.safetensors import SafetensorsFolder, Shard
from nemo_align.checkpoint.streaming.tensors import HeldTensor, num_bytes, read
from nemo_align.config.model import ModelConfig
from tests.checkpoint_files import write_safetensors
from tests.unit.checkpoint.test_conversion_sources import SIZES, write_hf

REWARD = {"attributes": ["a", "b", "c"], "weights": None, "head_bias": True}
HIDDEN = SIZES["hidden_size"]


@pytest.fixture
def head() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {reward_head.WEIGHT: (3, HIDDEN), reward_head.NORM_BIAS: (HIDDEN,), reward_head.BIAS: (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_head(folder: Path, head: dict[str, torch.Tensor]) -> None:
    shard = Shard(reward_head.HEAD_FILE, {name: HeldTensor(tensor) for name, tensor in head.items()})
    content = bytearray(shard.header)
    for source in shard.tensors.values():
        block = bytearray(num_bytes(source))
        source.read_rows(0, source.shape[0], memoryview(block))
        content += block
    (folder / reward_head.HEAD_FILE).write_bytes(content)


def write_reward(folder: Path, head: dict[str, torch.Tensor], **changes: object) -> Path:
    """As an export is: the head's bias folded into the final norm's, and the head as trained beside it."""
    files = SafetensorsFolder(write_hf(folder))
    tensors = {name: files.read(name) for name in files.names() - {"lm_head.weight"}}
    tensors["score.weight"] = head[reward_head.WEIGHT].float()
    tensors["model.norm.bias"] = reward_head.fold_bias(
        head[reward_head.WEIGHT], head[reward_head.BIAS], head[reward_head.NORM_BIAS]
    )
    write_safetensors(folder, tensors)
    config = hf_config(ModelConfig(**SIZES), dtype="fp32", bos_id=1, eos_id=2, pad_id=0, reward=REWARD | changes)
    (folder / "config.json").write_text(json.dumps(config))
    write_head(folder, head)
    return folder


def rewrite(folder: Path, changes: dict[str, torch.Tensor]) -> None:
    """Put other values in place of some."""
    files = SafetensorsFolder(folder)
    write_safetensors(folder, {name: files.read(name) for name in files.names()} | changes)


def changed(tensor: torch.Tensor) -> torch.Tensor:
    """The lowest bit of the first value flipped."""
    bits = tensor.clone().view(torch.int32)
    bits.view(-1)[0] ^= 1
    return bits.view(torch.float32)


def test_the_head_as_trained(head: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model = open_huggingface(write_reward(tmp_path / "hf", head))
    expected = {HEAD_WEIGHT: reward_head.WEIGHT, FINAL_NORM_BIAS: reward_head.NORM_BIAS, HEAD_BIAS: reward_head.BIAS}
    for key, name in expected.items():
        assert torch.equal(read(model.tensors[key]), head[name])


def test_a_model_that_was_trained_on(head: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """save_pretrained into the same folder leaves the file of before."""
    folder = write_reward(tmp_path / "hf", head)
    score = changed(head[reward_head.WEIGHT])
    rewrite(folder, {"score.weight": score})
    message = r"reward_head\.safetensors is not that of this model \(weight differs from score\.weight\): remove it to"
    with pytest.raises(ValueError, match=message):
        open_huggingface(folder)
    (folder / reward_head.HEAD_FILE).unlink()
    model = open_huggingface(folder)
    assert torch.equal(read(model.tensors[HEAD_WEIGHT]), score) and not read(model.tensors[HEAD_BIAS]).any()


def test_a_norm_that_was_trained_on(head: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = write_reward(tmp_path / "hf", head)
    before = SafetensorsFolder(folder).read("model.norm.bias")
    rewrite(folder, {"model.norm.bias": before * (1 + 1e-6)})
    with pytest.raises(ValueError, match=r"final_norm_bias with the bias folded in differs from model\.norm\.bias"):
        open_huggingface(folder)
    rewrite(folder, {"model.norm.bias": torch.nextafter(before, torch.tensor(9.0))})  # another machine's rounding
    open_huggingface(folder)


def test_without_a_bias_nothing_is_rounded(head: dict[str, torch.Tensor], tmp_path: Path) -> None:
    head[reward_head.BIAS] = torch.zeros(3)
    folder = write_reward(tmp_path / "hf", head)
    rewrite(folder, {"model.norm.bias": changed(head[reward_head.NORM_BIAS])})
    with pytest.raises(ValueError, match=r"differs from model\.norm\.bias"):
        open_huggingface(folder)


def test_a_head_in_bf16(head: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """As a `.nemo` has it; score.weight is fp32 always."""
    head = {name: tensor.bfloat16() for name, tensor in head.items()}
    model = open_huggingface(write_reward(tmp_path / "hf", head))
    assert torch.equal(read(model.tensors[HEAD_WEIGHT]), head[reward_head.WEIGHT])


def test_a_bias_that_the_config_denies(head: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """It was folded in: without it the scores would be others."""
    with pytest.raises(ValueError, match=r"not that of this model \(bias\): remove it"):
        open_huggingface(write_reward(tmp_path / "hf", head, head_bias=False))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [reward_head.NORM_BIAS, reward_head.BIAS])
def test_values_that_no_head_has(name: str, value: float, head: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = write_reward(tmp_path / "hf", head)
    head[name][1] = value
    write_head(folder, head)
    with pytest.raises(ValueError, match="values that are not finite"):
        open_huggingface(folder)


def test_weights_that_no_bias_can_be_folded_into(head: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = write_reward(tmp_path / "hf", head)
    rewrite(folder, {"score.weight": torch.ones(3, HIDDEN)})
    write_head(folder, head | {reward_head.WEIGHT: torch.ones(3, HIDDEN)})
    with pytest.raises(ValueError, match="bias cannot have been folded"):
        open_huggingface(folder)


def test_verifying_reads_what_others_read(head: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The kept head is compared with the source, and score.weight and the norm's bias with the kept head."""
    source = open_huggingface(write_reward(tmp_path / "source", head))
    assert to_huggingface(source).planned
    made = write_reward(tmp_path / "made", head)
    for name in ("model.safetensors", "config.json"):
        (made / name).write_bytes((tmp_path / "source" / name).read_bytes())
    verify_tensors(source, open_huggingface(made, verify=False), workers=1)
    rewrite(made, {"score.weight": changed(head[reward_head.WEIGHT])})
    with pytest.raises(ValueError, match=r"weight differs from score\.weight"):
        verify_tensors(source, open_huggingface(made, verify=False), workers=1)
