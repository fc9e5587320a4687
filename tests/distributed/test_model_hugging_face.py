"""Logits equal those of transformers' NemotronForCausalLM on the same random weights, on several layouts.

Keys alone prove nothing: with a wrong rotary percentage all keys match and half of the tokens come out wrong.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_align.config.model import ModelConfig
from nemo_align.config.objectives import RewardConfig
from tests.distributed.model_steps import (
    MICRO_BATCHES,
    SEGMENTS,
    full_step,
    outputs,
    tokens_of,
    world_size,
)
from tests.distributed.pool import with_topology
from tests.unit.model.configs import tiny_model

MODELS = {
    "wide_heads": tiny_model(),  # head_dim x heads is twice the hidden size
    "mha": tiny_model(num_query_groups=8, head_dim=None),
    "quarter_rotary": tiny_model(rotary_percent=0.25, rotary_base=500, layernorm_epsilon=1e-3),
}


def _hugging_face(model: ModelConfig):
    from transformers import NemotronConfig, NemotronForCausalLM

    torch.manual_seed(3)
    reference = NemotronForCausalLM(
        NemotronConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            head_dim=model.head_dim,
            norm_eps=model.layernorm_epsilon,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": float(model.rotary_base),
                "partial_rotary_factor": model.rotary_percent,
            },
            pad_token_id=None,
        )
    ).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # norms too: their initial values would hide a mistake
            parameter.normal_(0, 0.2 if parameter.dim() == 1 else 0.1)
    return reference


def _megatron_weights(reference, model: ModelConfig) -> dict[str, Tensor]:
    """Whole tensors under the names that the local layer spec has in memory."""
    state, weights = reference.state_dict(), {}
    heads, groups = model.num_attention_heads, model.num_query_groups
    for layer in range(model.num_layers):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        query, key, value = (state[f"{theirs}self_attn.{part}_proj.weight"] for part in "qkv")
        head = query.size(0) // heads
        # Group by group: its query heads, its key head, its value head.
        grouped = [
            tensor.view(groups, -1, head, model.hidden_size)
            for tensor in (query.view(groups, -1, model.hidden_size), key, value)
        ]
        weights[f"{ours}self_attention.linear_qkv.weight"] = torch.cat(grouped, dim=1).reshape(-1, model.hidden_size)
        for mine, other in {
            "self_attention.linear_proj": "self_attn.o_proj",
            "mlp.linear_fc1": "mlp.up_proj",
            "mlp.linear_fc2": "mlp.down_proj",
        }.items():
            weights[f"{ours}{mine}.weight"] = state[f"{theirs}{other}.weight"]
        for kind in ("weight", "bias"):
            weights[f"{ours}input_layernorm.{kind}"] = state[f"{theirs}input_layernorm.{kind}"]
            weights[f"{ours}pre_mlp_layernorm.{kind}"] = state[f"{theirs}post_attention_layernorm.{kind}"]
    for kind in ("weight", "bias"):
        weights[f"decoder.final_layernorm.{kind}"] = state[f"model.norm.{kind}"]
    weights["embedding.word_embeddings.weight"] = state["model.embed_tokens.weight"]
    weights["output_layer.weight"] = state["lm_head.weight"]
    return weights


@torch.no_grad()
def _by_segment(function, model: ModelConfig, packed: bool) -> Tensor:
    """[micro-batch, S, ...]: function of each segment alone, put together."""
    rows = []
    for number in range(MICRO_BATCHES):
        tokens = tokens_of(number, model.vocab_size)
        boundaries = SEGMENTS[number] if packed else [0, tokens.size(1)]
        pieces = [function(tokens[:, begin:end]) for begin, end in pairwise(boundaries)]
        rows.append(torch.cat(pieces, dim=1))
    return torch.cat(rows)


def _ours(request, model: ModelConfig, parallel: dict[str, Any], weights: dict[str, Tensor], **arguments):
    pool = request.getfixturevalue(f"pool{world_size(parallel)}")
    return pool.run(with_topology, full_step, parallel, model, parallel, weights=weights, **arguments)


@pytest.mark.parametrize(
    ("name", "parallel", "packed"),
    [
        ("wide_heads", {}, False),
        ("wide_heads", {}, True),
        ("mha", {}, True),
        ("quarter_rotary", {}, True),
        ("wide_heads", {"tensor": 2}, True),
        ("wide_heads", {"tensor": 2, "sequence": True}, False),
        ("wide_heads", {"pipeline": 2}, True),
        ("wide_heads", {"pipeline": 2, "virtual_pipeline": 2}, True),
    ],
)
def test_logits_equal_hugging_face(request, name: str, parallel: dict[str, Any], packed: bool) -> None:
    model = MODELS[name]
    reference = _hugging_face(model)
    expected = _by_segment(lambda tokens: reference(tokens).logits, model, packed)
    answers = _ours(request, model, parallel, _megatron_weights(reference, model), packed=packed)
    assert expected.abs().max() > 1  # so that the tolerance means something
    torch.testing.assert_close(outputs(answers, model.vocab_size), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "parallel", [{}, {"tensor": 2, "sequence": True}, {"pipeline": 2}], ids=["1", "tensor2_sequence", "pipeline2"]
)
def test_reward_scores_equal_hidden_state_times_head(request, parallel: dict[str, Any], bias: bool) -> None:
    model, reward = MODELS["wide_heads"], RewardConfig(attributes=[f"a{index}" for index in range(9)], head_bias=bias)
    reference = _hugging_face(model)
    head_weight, head_bias = torch.randn(9, model.hidden_size), torch.randn(9)
    weights = {**_megatron_weights(reference, model), "reward_head.weight": head_weight, "reward_head.bias": head_bias}
    answers = _ours(request, model, parallel, weights, reward=reward)
    expected = _by_segment(
        lambda tokens: reference.model(tokens).last_hidden_state @ head_weight.T + (head_bias if bias else 0.0),
        model,
        packed=True,
    )
    scores = outputs(answers, None)
    assert scores.shape == (MICRO_BATCHES, 24, 9)
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-4)  # sums of 64 products of order one
    names = {name for answer in answers for name in answer["weights"]}
    assert ("reward_head.bias" in names) is bias and not any("output_layer" in name for name in names)
