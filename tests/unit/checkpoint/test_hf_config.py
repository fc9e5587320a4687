"""config.json both ways, with the names that the rotary part of a head had over the years."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_align.checkpoint.huggingface.model_config import hf_config
from nemo_align.config.hf_model import hf_model_config, hf_reward_config
from nemo_align.config.model import ModelConfig

# Shapes of public configs: the community's 340B, Minitron-4B and a Nemotron-3 22B.
PUBLIC = {
    "340b": (18432, 73728, 96, 96, 8, None, 0.0063),
    "minitron_4b": (3072, 9216, 32, 24, 8, 128, 0.0134),
    "minitron_8b": (4096, 16384, 32, 48, 8, 128, 0.0134),  # 48 x 128 is not 4096
    "nemotron3_22b": (6144, 24576, 40, 48, 48, 128, 0.008),
}


def public(name: str, **changes: object) -> dict:
    hidden, ffn, layers, heads, groups, head_dim, std = PUBLIC[name]
    values = {
        "architectures": ["NemotronForCausalLM"],
        "model_type": "nemotron",
        "vocab_size": 256000,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "initializer_range": std,
        "norm_eps": 1e-5,
        "rope_theta": 10000,
        "partial_rotary_factor": 0.5,
    } | changes
    return {key: value for key, value in values.items() if value is not ...}


def read(tmp_path: Path, values: dict) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(values))
    return hf_model_config(tmp_path)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_shapes(name: str, tmp_path: Path) -> None:
    model = read(tmp_path, public(name))
    sizes = (model.hidden_size, model.ffn_hidden_size, model.num_layers, model.num_attention_heads)
    assert (*sizes, model.num_query_groups, model.head_dim, model.init_std) == PUBLIC[name]
    assert (model.rotary_percent, model.rotary_base, model.layernorm_epsilon) == (0.5, 10000, 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"partial_rotary_factor": 0.25},
        {"partial_rotary_factor": ..., "rope_percent": 0.25},
        {"partial_rotary_factor": ..., "rope_percentage": 0.25},
        {"partial_rotary_factor": ..., "rope_percent": 0.25, "rope_percentage": 0.25},
        {
            "partial_rotary_factor": ...,
            "rope_theta": ...,
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25, "rope_theta": 10000.0},
        },
    ],
)
def test_every_name_of_the_rotary_part(changes: dict, tmp_path: Path) -> None:
    assert read(tmp_path, public("340b", **changes)).rotary_percent == 0.25


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"partial_rotary_factor": ...}, "does not say the rotary part of a head"),
        ({"rope_theta": ...}, "does not say the rotary base"),
        (
            {"rope_percent": 1.0},
            "contradicts itself about the rotary part.*partial_rotary_factor=0.5, rope_percent=1.0",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}}, "rope_parameters.partial_rotary_factor=1.0"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "contradicts itself about the rotary base"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type='linear'"),
        ({"kv_channels": 64, "head_dim": 128}, "head_dim=128 contradicts kv_channels=64"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "silu"}, "hidden_act='silu', the Nemotron-4 architecture has 'relu2'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"hidden_size": ..., "norm_eps": ...}, "lacks hidden_size, norm_eps"),
    ],
)
def test_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, public("minitron_4b", **changes))


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        hf_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        hf_model_config(tmp_path)


@pytest.mark.parametrize("head_dim", [None, 128])
def test_what_we_write_reads_back_and_transformers_agrees(head_dim: int | None, tmp_path: Path) -> None:
    from transformers import AutoConfig

    model = ModelConfig(
        name=tmp_path.name,
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=256,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=head_dim,
        vocab_size=1000,
        max_sequence_length=128,
        rotary_percent=0.25,
        rotary_base=50000,
        layernorm_epsilon=1e-6,
        init_std=0.01,
    )
    reward = {"attributes": ["b", "a"], "weights": {"a": 1.0, "b": -0.5}, "head_bias": True}
    values = hf_config(model, dtype="bf16", bos_id=2, eos_id=3, pad_id=5, reward=reward)
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = hf_model_config(tmp_path)
    assert found.head_dim == (head_dim or 16)  # always written
    found.head_dim = head_dim
    assert found == model
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert theirs.head_dim == (head_dim or 16)
    assert theirs.rope_parameters["partial_rotary_factor"] == 0.25 and theirs.rope_parameters["rope_theta"] == 50000
    assert str(theirs.dtype) == "torch.bfloat16"
    assert (theirs.num_labels, theirs.id2label, theirs.pad_token_id) == (2, {0: "b", 1: "a"}, 5)
    back = hf_reward_config(tmp_path)
    assert (back.attributes, back.weights, back.head_bias) == (["b", "a"], {"a": 1.0, "b": -0.5}, True)


# What vllm/model_executor/models/nemotron.py reads of a config in vLLM 0.12.0 and 0.33.0. (`bias` and `logit_scale` are
# read too, with defaults that mean what Nemotron has: none and 1.)
VLLM_FIELDS = """
    attention_bias head_dim hidden_act hidden_size intermediate_size max_position_embeddings mlp_bias norm_eps
    num_attention_heads num_hidden_layers num_key_value_heads partial_rotary_factor rope_parameters tie_word_embeddings
    vocab_size
"""


def test_an_export_has_the_fields_that_vllm_reads() -> None:
    sizes = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2}
    model = ModelConfig(name="tiny", vocab_size=11, head_dim=4, **sizes)
    values = hf_config(model, dtype="bf16", bos_id=1, eos_id=2, pad_id=0, reward=None)
    assert set(VLLM_FIELDS.split()) <= {name for name, value in values.items() if value is not None}
    assert values["architectures"] == ["NemotronForCausalLM"]
    assert values["rope_parameters"]["partial_rotary_factor"] == values["partial_rotary_factor"] == 0.5
