"""The card of an export counts what is stored, and says of a merge what it was made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from nemo_align.checkpoint.conversion.merge import merge
from nemo_align.checkpoint.conversion.model_card import model_card
from nemo_align.checkpoint.conversion.open_huggingface import open_huggingface
from nemo_align.checkpoint.huggingface import reward_head
from nemo_align.config.conversion import MergeConfig
from tests.unit.checkpoint.test_conversion_sources import SIZES, write_hf
from tests.unit.checkpoint.test_kept_head import HIDDEN, write_reward


def test_a_reward_model_has_no_output_layer_to_count(tmp_path: Path) -> None:
    heads = {reward_head.WEIGHT: (3, HIDDEN), reward_head.NORM_BIAS: (HIDDEN,), reward_head.BIAS: (3,)}
    generator = torch.Generator().manual_seed(0)
    head = {name: torch.randn(shape, generator=generator) for name, shape in heads.items()}
    model = open_huggingface(write_reward(tmp_path / "rm", head))
    card = model_card(model, None, dtype="fp32")
    vocabulary, width, ffn = SIZES["vocab_size"], SIZES["hidden_size"], SIZES["ffn_hidden_size"]
    attention = width * (4 + 2 * 2) * 4 + 4 * 4 * width
    expected = vocabulary * width + attention + 2 * width * ffn + 3 * 2 * width + 3 * width + 3
    assert f"| parameters | {expected:,} |" in card
    assert "`score` has no bias" in card
    without = replace(model, reward=model.reward | {"head_bias": False})
    assert "`score` has no bias" not in model_card(without, None, dtype="fp32")


def test_a_merge_names_its_sources(tmp_path: Path) -> None:
    sources = [str(write_hf(tmp_path / name)) for name in ("one", "two")]
    target = tmp_path / "merged"
    merge(MergeConfig(target_format="hf", sources=sources, weights=[1.0, 3.0], target=str(target)))
    card = (target / "README.md").read_text()
    assert "Made by `nemo-align merge` (linear) of:" in card
    assert f"- `{sources[0]}`, weight 0.25\n- `{sources[1]}`, weight 0.75" in card
    merge(MergeConfig(target_format="hf", sources=sources, method="slerp", t=0.4, target=str(tmp_path / "arc")))
    assert f"(slerp at 0.4) of:\n\n- `{sources[0]}`\n- `{sources[1]}`" in (tmp_path / "arc" / "README.md").read_text()
