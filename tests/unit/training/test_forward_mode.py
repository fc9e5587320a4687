"""Passes without gradients leave no trace in training."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_align.training.forward import forward_mode


def chunk(recipe: str) -> MegatronModule:
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=1, fp8="hybrid", fp8_recipe=recipe, bf16=True
    )
    return MegatronModule(config)


@pytest.mark.parametrize(("recipe", "inside"), [("delayed", None), ("tensorwise", "hybrid")])
def test_only_a_recipe_with_histories_rests(recipe, inside):
    chunks = [chunk(recipe), chunk(recipe)]

    def failing_pass() -> None:
        with forward_mode(chunks):
            assert [one.config.fp8 for one in chunks] == [inside, inside]
            assert not torch.is_grad_enabled() and not any(one.training for one in chunks)
            raise RuntimeError("a pass fails")

    with pytest.raises(RuntimeError, match="a pass fails"):
        failing_pass()
    assert [one.config.fp8 for one in chunks] == ["hybrid", "hybrid"]
    assert all(one.training for one in chunks)


def test_chunks_of_one_configuration_get_it_back():
    first = chunk("delayed")
    second = MegatronModule(first.config)
    with forward_mode([first, second]):
        assert second.config.fp8 is None
    assert first.config.fp8 == "hybrid"
