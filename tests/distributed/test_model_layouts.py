"""The same model on every layout: initial weights, outputs and gradients of each parameter equal those of one process.

Gradients pass through Megatron's own schedule, DDP and finalize_model_grads. Tolerances are for fp32 sums in another
order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_align.config.objectives import RewardConfig
from tests.distributed.model_steps import full_step, outputs, whole, world_size
from tests.distributed.pool import with_topology
from tests.unit.model.configs import tiny_model

MODEL = tiny_model()
REWARD = RewardConfig(attributes=["helpfulness", "correctness", "verbosity"], head_init_std=0.3)
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor2": {"tensor": 2},
    "tensor2_sequence": {"tensor": 2, "sequence": True},
    "pipeline2": {"pipeline": 2},
    "pipeline2_interleaved": {"pipeline": 2, "virtual_pipeline": 2},
    "recompute_selective": {"tensor": 2, "recompute": "selective"},
    "recompute_full": {"tensor": 2, "sequence": True, "recompute": "full"},
    "recompute_block": {"tensor": 2, "sequence": True, "recompute": "block"},
    "tensor2_pipeline2_sequence": {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True},
}


def _run(request: pytest.FixtureRequest, parallel: dict[str, Any], model=MODEL, **arguments) -> list[dict[str, Any]]:
    pool = request.getfixturevalue(f"pool{world_size(parallel)}")
    return pool.run(with_topology, full_step, parallel, model, parallel, seed=5, **arguments)


_baselines: dict[str, list[dict[str, Any]]] = {}


def _baseline(request: pytest.FixtureRequest, kind: str) -> list[dict[str, Any]]:
    if kind not in _baselines:
        _baselines[kind] = _run(request, {}, reward=REWARD if kind == "reward" else None)
    return _baselines[kind]


def _assert_same(answers: list[dict[str, Any]], expected: list[dict[str, Any]], model, kind: str) -> None:
    vocab = model.vocab_size
    weights, expected_weights = whole(answers, "weights", vocab), whole(expected, "weights", vocab)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), f"initial {name}"
    columns = vocab if kind == "policy" else None
    torch.testing.assert_close(outputs(answers, columns), outputs(expected, columns), atol=2e-6, rtol=1e-4)
    gradients, expected_gradients = whole(answers, "gradients", vocab), whole(expected, "gradients", vocab)
    for name, gradient in gradients.items():
        scale = expected_gradients[name].abs().max()
        assert scale > 0, f"{name} has no gradient"
        assert (gradient - expected_gradients[name]).abs().max() < 2e-5 * scale, f"gradient of {name}"


@pytest.mark.parametrize("kind", ["policy", "reward"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(request: pytest.FixtureRequest, layout: str, kind: str) -> None:
    answers = _run(request, LAYOUTS[layout], reward=REWARD if kind == "reward" else None)
    _assert_same(answers, _baseline(request, kind), MODEL, kind)


def test_fewer_groups_than_tensor_ranks(request: pytest.FixtureRequest) -> None:
    """One key/value head for two ranks: Megatron gathers the projection."""
    model = tiny_model(num_query_groups=1)
    expected = _run(request, {}, model)
    _assert_same(_run(request, {"tensor": 2}, model), expected, model, "policy")


def test_initial_weights_have_the_configured_spread(request: pytest.FixtureRequest) -> None:
    weights = whole(_baseline(request, "reward"), "weights", MODEL.vocab_size)
    # A sample of n values has a standard deviation within 4 / sqrt(2n) of the true one.
    for name, std in {
        "embedding.word_embeddings.weight": 0.05,
        "decoder.layers.2.self_attention.linear_qkv.weight": 0.05,
        "decoder.layers.2.mlp.linear_fc1.weight": 0.05,
        "decoder.layers.2.self_attention.linear_proj.weight": 0.05 / 8**0.5,
        "decoder.layers.2.mlp.linear_fc2.weight": 0.05 / 8**0.5,
        "reward_head.weight": 0.3,
    }.items():
        assert abs(weights[name].std() / std - 1) < 4 / (2 * weights[name].numel()) ** 0.5, name
    assert weights["reward_head.bias"].abs().max() == 0
    norms = [weight for name, weight in weights.items() if "layernorm" in name]
    assert len(norms) == 2 * (2 * MODEL.num_layers + 1) and all(norm.abs().max() == 0 for norm in norms)


def test_no_two_weights_are_drawn_alike(request: pytest.FixtureRequest) -> None:
    weights = whole(_baseline(request, "policy"), "weights", MODEL.vocab_size)
    first = [f"{weight.flatten()[0]:.9f}" for name, weight in weights.items() if "norm" not in name]
    assert len(set(first)) == len(first)


def test_seed_of_the_run_changes_the_weights(request: pytest.FixtureRequest) -> None:
    other = request.getfixturevalue("pool1").run(with_topology, full_step, {}, MODEL, {}, seed=6)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    expected = whole(_baseline(request, "policy"), "weights", MODEL.vocab_size)[name]
    assert not torch.equal(whole(other, "weights", MODEL.vocab_size)[name], expected)


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "sequence": True}, {"pipeline": 2}], ids=["1", "tp2sp", "pp2"])
@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_bf16_has_bf16_weights_and_stays_near_fp32(request, parallel: dict[str, Any], kind: str) -> None:
    reward = REWARD if kind == "reward" else None
    answers = _run(request, parallel, reward=reward, dtype="bf16")
    for answer in answers:
        dtypes = {name: weight.dtype for name, (weight, _) in answer["weights"].items()}
        assert {dtype for name, dtype in dtypes.items() if not name.startswith("reward_head")} == {torch.bfloat16}
        assert {dtype for name, dtype in dtypes.items() if name.startswith("reward_head")} <= {torch.float32}
    columns = MODEL.vocab_size if kind == "policy" else None
    result, expected = outputs(answers, columns), outputs(_baseline(request, kind), columns)
    assert result.dtype == (torch.bfloat16 if kind == "policy" else torch.float32)
    # Eight roundings to 8 bits per residual addition, outputs of order 1.
    assert (result.float() - expected).abs().max() < 0.03 * expected.abs().max()
