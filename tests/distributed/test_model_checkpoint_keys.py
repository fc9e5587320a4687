"""What the model says about itself to a distributed checkpoint: Transformer Engine's keys, and any layout reads any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_align.config.objectives import RewardConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from tests.distributed.model_steps import is_split, named_in_whole_model, whole, world_size
from tests.distributed.pool import with_topology
from tests.unit.model.configs import tiny_model

MODEL = tiny_model()
REWARD = RewardConfig(attributes=["helpfulness", "verbosity"])

# Tensors of the released checkpoints (and of Transformer Engine's layers), layers stacked under one key.
SHARED = {
    "embedding.word_embeddings.weight",
    "decoder.layers.self_attention.linear_qkv.weight",
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
    "decoder.layers.self_attention.linear_qkv.layer_norm_bias",
    "decoder.layers.self_attention.linear_proj.weight",
    "decoder.layers.mlp.linear_fc1.weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.mlp.linear_fc1.layer_norm_bias",
    "decoder.layers.mlp.linear_fc2.weight",
    "decoder.final_layernorm.weight",
    "decoder.final_layernorm.bias",
}


def _build(topology, parallel: dict[str, Any], reward: RewardConfig | None):
    from nemo_align.model.build import build_model

    precision = PrecisionConfig(dtype="fp32")
    return build_model(MODEL, ParallelConfig(**parallel), precision, topology, reward_head=reward)


def keys(topology, reward: RewardConfig | None) -> tuple[set[str], dict[str, tuple[int, ...]]]:
    """Keys of tensors with their global shapes, for one process."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    state = _build(topology, {}, reward)[0].sharded_state_dict()
    tensors = [entry for entry in state.values() if isinstance(entry, ShardedTensor)]
    return {tensor.key for tensor in tensors}, {tensor.key: tuple(tensor.global_shape) for tensor in tensors}


def save(topology, parallel: dict[str, Any], folder: str) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    chunks = _build(topology, parallel, REWARD)
    with torch.no_grad():
        for chunk in chunks:  # a bias of zero would hide that it was not read
            if chunk.post_process:
                chunk.reward_head.bias.copy_(torch.tensor([3.0, -4.0]))
    dist_checkpointing.save(_state(chunks), folder)
    return _weights(chunks, topology)


def load(topology, parallel: dict[str, Any], folder: str) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    chunks = _build(topology, parallel, REWARD)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
    # Megatron fills the tensors of the model in place.
    dist_checkpointing.load(_state(chunks), folder)
    return _weights(chunks, topology)


def _state(chunks) -> dict[str, Any]:
    return {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}


def _weights(chunks, topology) -> dict[str, Any]:
    named = {name: parameter for chunk in chunks for name, parameter in named_in_whole_model(chunk)}
    weights = {
        name: (parameter.detach().clone(), parameter.partition_dim if is_split(parameter) else None)
        for name, parameter in named.items()
    }
    return {"weights": weights, "place": (topology.pipeline_rank, topology.tensor_rank)}


@pytest.mark.parametrize("reward", [None, REWARD], ids=["policy", "reward"])
def test_keys_are_those_of_transformer_engine(pool1, reward: RewardConfig | None) -> None:
    ((names, shapes),) = pool1.run(with_topology, keys, {}, reward)
    assert names == SHARED | ({"output_layer.weight"} if reward is None else {"reward_head.weight", "reward_head.bias"})
    assert shapes["decoder.layers.self_attention.linear_qkv.weight"] == (4, (8 + 2 * 2) * 16, 64)
    assert shapes["decoder.layers.mlp.linear_fc2.weight"] == (4, 64, 192)
    assert shapes["embedding.word_embeddings.weight"] == (252, 64)  # padded to a multiple of 4
    if reward is not None:
        assert shapes["reward_head.weight"] == (2, 64)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({}, {"tensor": 2, "sequence": True}),
        ({"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}),
        ({"pipeline": 2}, {}),
    ],
    ids=["1_to_tensor2", "tensor2_to_interleaved", "pipeline2_to_1"],
)
def test_a_reward_model_moves_between_layouts(
    request: pytest.FixtureRequest, tmp_path: Path, source: dict[str, Any], target: dict[str, Any]
) -> None:
    saved, loaded = (
        whole(
            request.getfixturevalue(f"pool{world_size(parallel)}").run(
                with_topology, function, parallel, parallel, str(tmp_path)
            ),
            "weights",
            MODEL.vocab_size,
        )
        for function, parallel in ((save, source), (load, target))
    )
    assert saved.keys() == loaded.keys() and saved["reward_head.bias"].tolist() == [3.0, -4.0]
    for name, weight in saved.items():
        assert torch.equal(weight, loaded[name]), name
