"""Weights alone: under any layout, from policy to reward model, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from tests.distributed import checkpoint_runs as runs
from tests.distributed.pool import WorkerPool, with_topology

ONE = {}
LAYOUTS = [
    {"tensor": 2},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"data": 2},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def policy(pool1: WorkerPool, tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    [path] = pool1.run(with_topology, runs.train_and_save, ONE, str(tmp_path_factory.mktemp("policy")), tokenizer, 2)
    return path


@pytest.fixture(scope="module")
def reward(pool1: WorkerPool, tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = str(tmp_path_factory.mktemp("reward"))
    [path] = pool1.run(with_topology, runs.train_and_save, ONE, run_dir, tokenizer, 2, reward=True)
    return path


def load_and_save(topology, path: str, run_dir: str, tokenizer: str, *, load_head: bool = False, **options) -> str:
    from nemo_align.checkpoint import megatron, store

    run = runs.build(topology, **options)
    megatron.load_weights(store.resolve(path), run.chunks, topology, load_head=load_head)
    return runs.save(run, run_dir, 0, tokenizer, weights_only=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_layout(layout: dict, policy: str, pool2: WorkerPool, tokenizer: str, tmp_path: Path) -> None:
    path = pool2.run(with_topology, load_and_save, layout, policy, str(tmp_path), tokenizer, seed=7)[0]
    runs.assert_equal(runs.weights_of(path), runs.weights_of(policy))


def test_four_ranks_and_back(policy: str, pool1: WorkerPool, pool4: WorkerPool, tokenizer: str, tmp_path: Path) -> None:
    layout = {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "sequence": True}
    path = pool4.run(with_topology, load_and_save, layout, policy, str(tmp_path / "a"), tokenizer, seed=7)[0]
    [path] = pool1.run(with_topology, load_and_save, ONE, path, str(tmp_path / "b"), tokenizer, seed=8)
    runs.assert_equal(runs.weights_of(path), runs.weights_of(policy))


def padding(topology, path: str) -> float:
    from nemo_align.checkpoint import megatron, store
    from nemo_align.checkpoint.sharded_state import bare_model

    run = runs.build(topology)
    megatron.load_weights(store.resolve(path), run.chunks, topology, load_head=False)
    weight = bare_model(run.chunks[0]).embedding.word_embeddings.weight
    first = topology.tensor_rank * weight.shape[0]
    assert weight.shape[0] == 204
    return float(weight[max(0, 401 - first) :].abs().sum())


def test_padding_rows_become_zero(policy: str, pool2: WorkerPool) -> None:
    assert pool2.run(with_topology, padding, {"tensor": 2}, policy) == [0.0, 0.0]


def test_another_number_format_rounds(policy: str, pool1: WorkerPool, tokenizer: str, tmp_path: Path) -> None:
    [path] = pool1.run(with_topology, load_and_save, ONE, policy, str(tmp_path), tokenizer, dtype="bf16")
    expected = {name: weight.bfloat16() for name, weight in runs.weights_of(policy).items()}
    runs.assert_equal(runs.weights_of(path), expected)


@pytest.mark.parametrize("layout", [{"tensor": 2, "sequence": True}, {"pipeline": 2}], ids=str)
def test_a_reward_model_starts_from_a_policy(
    layout: dict, policy: str, pool2: WorkerPool, tokenizer: str, tmp_path: Path
) -> None:
    path = pool2.run(with_topology, load_and_save, layout, policy, str(tmp_path), tokenizer, reward=True)[0]
    found, expected = runs.weights_of(path), runs.weights_of(policy)
    head = found.pop("reward_head.weight")
    assert not found.pop("reward_head.bias").any()
    del expected["output_layer.weight"]
    runs.assert_equal(found, expected)
    assert head.shape == (3, 32) and 0.02 < float(head.std()) < 0.09  # init_std 0.05: as initialised


@pytest.mark.parametrize("load_head", [False, True])
def test_a_reward_model_takes_a_head_only_if_asked(
    load_head: bool, reward: str, pool2: WorkerPool, tokenizer: str, tmp_path: Path
) -> None:
    options = {"load_head": load_head, "reward": True, "seed": 5}
    path = pool2.run(with_topology, load_and_save, {"tensor": 2}, reward, str(tmp_path), tokenizer, **options)[0]
    found, expected = runs.weights_of(path), runs.weights_of(reward)
    same = torch.equal(found["reward_head.weight"], expected["reward_head.weight"])
    assert same == load_head
    assert bool(found["reward_head.bias"].any()) == load_head
    backbone = [name for name in expected if not name.startswith("reward_head.")]
    runs.assert_equal({name: found[name] for name in backbone}, {name: expected[name] for name in backbone})


def refused(topology, path: str, *, load_head: bool = False, **options) -> str:
    from nemo_align.checkpoint import megatron, store

    run = runs.build(topology, **options)
    with pytest.raises(ValueError) as caught:
        megatron.load_weights(store.resolve(path), run.chunks, topology, load_head=load_head)
    return str(caught.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rotary_percent": 1.0}, "model.rotary_percent is 1.0, the checkpoint has 0.5"),  # fits every tensor
        ({"num_query_groups": 1}, "model.num_query_groups is 1, the checkpoint has 2"),
        ({"layernorm_epsilon": 1e-6}, "model.layernorm_epsilon is 1e-06, the checkpoint has 1e-05"),
        ({"num_layers": 6}, "missing in the checkpoint: decoder.layers.4."),
        ({"num_layers": 2}, "in the checkpoint but not in the model: decoder.layers.2."),
        ({"hidden_size": 64}, "model.hidden_size is 64, the checkpoint has 32"),
        ({"vocab_size": 390}, "fewer than the checkpoint's vocabulary of 401"),
        ({"reward": True, "load_head": True}, "has no reward head: set reward.load_head=false"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, message: str, policy: str, pool1: WorkerPool) -> None:
    [found] = pool1.run(with_topology, refused, ONE, policy, **options)
    assert message in found


def test_a_policy_does_not_start_from_a_reward_model(reward: str, pool1: WorkerPool) -> None:
    [found] = pool1.run(with_topology, refused, ONE, reward)
    assert "is a reward model: it has no output layer" in found


def test_names_are_transformer_engines(policy: str) -> None:
    layer = "decoder.layers.3."
    assert set(runs.weights_of(policy)) >= {
        "embedding.word_embeddings.weight",
        layer + "self_attention.linear_qkv.layer_norm_weight",
        layer + "self_attention.linear_qkv.layer_norm_bias",
        layer + "self_attention.linear_qkv.weight",
        layer + "self_attention.linear_proj.weight",
        layer + "mlp.linear_fc1.layer_norm_weight",
        layer + "mlp.linear_fc1.layer_norm_bias",
        layer + "mlp.linear_fc1.weight",
        layer + "mlp.linear_fc2.weight",
        "decoder.final_layernorm.weight",
        "decoder.final_layernorm.bias",
        "output_layer.weight",
    }
    assert len(runs.weights_of(policy)) == 4 * 8 + 4


class Malicious:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return (Path.touch, (self.witness,))


def poisoned(topology, path: str, optimizer: bool) -> str:
    from nemo_align.checkpoint import megatron, store

    run = runs.build(topology)
    try:
        if optimizer:
            megatron.load_training(Path(path), run.chunks, run.optimizer, run.scheduler, topology, verify=False)
        else:
            megatron.load_weights(store.resolve(path), run.chunks, topology, load_head=False, verify=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "loaded"


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Change a file and what the manifest says of it, as an attacker would."""
    import json

    from nemo_align.checkpoint import checksums
    from nemo_align.checkpoint.manifest import write_manifest

    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = checksums.entry_of_file(folder / name)
    write_manifest(folder, manifest)


@pytest.mark.parametrize("place", [".metadata", "common.pt", "byte entry"])
@pytest.mark.parametrize("environment", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_no_pickle_of_a_checkpoint_runs(
    place: str, environment: str | None, pool1: WorkerPool, tokenizer: str, tmp_path: Path
) -> None:
    import io

    from nemo_align.checkpoint.safe_reading import read_metadata

    [path] = pool1.run(with_topology, runs.train_and_save, ONE, str(tmp_path / "run"), tokenizer, 1, final=False)
    folder, witness = Path(path), tmp_path / "witness"
    if place == ".metadata":
        rewrite(folder, place, pickle.dumps(Malicious(witness)))
    elif place == "common.pt":  # what megatron-core 0.16 writes and 0.19 still reads first
        buffer = io.BytesIO()
        torch.save({"scheduler": Malicious(witness)}, buffer)
        rewrite(folder, place, buffer.getvalue())
    else:
        metadata = read_metadata(folder)
        buffer = io.BytesIO()
        torch.save([Malicious(witness)], buffer)
        entries = [info for index, info in metadata.storage_data.items() if index.fqn.startswith("rng_state")]
        content = bytearray((folder / entries[0].relative_path).read_bytes())
        for index, info in metadata.storage_data.items():
            if index.fqn.startswith("rng_state"):
                info.offset, info.length = len(content), len(buffer.getvalue())
        content += buffer.getvalue()
        rewrite(folder, entries[0].relative_path, bytes(content))
        rewrite(folder, ".metadata", pickle.dumps(metadata))
    [outcome] = pool1.run(with_environment, environment, with_topology, poisoned, ONE, path, True)
    assert outcome.startswith("ValueError") and "is refused" in outcome, outcome
    assert not witness.exists()
    if place == ".metadata":
        [outcome] = pool1.run(with_environment, environment, with_topology, poisoned, ONE, path, False)
        assert "is refused" in outcome and not witness.exists()


def with_environment(name: str | None, function, *args):
    import os

    if name is None:
        return function(*args)
    os.environ[name] = "1"
    try:
        return function(*args)
    finally:
        del os.environ[name]


def test_the_planted_pickle_would_run_without_limits(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(tmp_path / "witness")))
    assert (tmp_path / "witness").exists()
