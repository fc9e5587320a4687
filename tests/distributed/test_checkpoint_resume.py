"""Resuming from a distributed checkpoint: exact on the same layout, exact under another where the save allows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import checkpoint_runs as runs
from tests.distributed.pool import RemoteError, WorkerPool, with_topology

ONE, DATA, TENSOR = {}, {"data": 2}, {"tensor": 2, "sequence": True}
PIPELINE, INTERLEAVED = {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def uninterrupted(pool1: WorkerPool, tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Weights, fp32 copies and moments after four steps on one rank without a break."""
    run_dir = str(tmp_path_factory.mktemp("uninterrupted"))
    [path] = pool1.run(with_topology, runs.train_and_save, ONE, run_dir, tokenizer, 4)
    return runs.weights_of(path, optimizer=True)


def pool_for(layout: dict, pool1: WorkerPool, pool2: WorkerPool) -> WorkerPool:
    return pool1 if layout == ONE else pool2


@pytest.mark.parametrize("final", [True, False], ids=["final", "periodic"])
@pytest.mark.parametrize("layout", [ONE, DATA, TENSOR, PIPELINE, INTERLEAVED], ids=str)
def test_same_layout_is_exact(
    layout: dict, final: bool, pool1: WorkerPool, pool2: WorkerPool, tokenizer: str, uninterrupted: dict, tmp_path: Path
) -> None:
    pool = pool_for(layout, pool1, pool2)
    path = pool.run(with_topology, runs.train_and_save, layout, str(tmp_path), tokenizer, 2, final=final)[0]
    path = pool.run(with_topology, runs.resume_and_save, layout, path, str(tmp_path), tokenizer, 2, 4)[0]
    runs.assert_equal(runs.weights_of(path, optimizer=True), uninterrupted)


@pytest.mark.parametrize(
    "saved, loaded",
    [(ONE, TENSOR), (TENSOR, ONE), (ONE, PIPELINE), (INTERLEAVED, ONE), (DATA, INTERLEAVED), (TENSOR, PIPELINE)],
    ids=str,
)
def test_a_final_save_loads_under_any_layout(
    saved: dict, loaded: dict, pool1: WorkerPool, pool2: WorkerPool, tokenizer: str, uninterrupted: dict, tmp_path: Path
) -> None:
    path = pool_for(saved, pool1, pool2).run(with_topology, runs.train_and_save, saved, str(tmp_path), tokenizer, 2)[0]
    pool = pool_for(loaded, pool1, pool2)
    path = pool.run(with_topology, runs.resume_and_save, loaded, path, str(tmp_path), tokenizer, 2, 4)[0]
    runs.assert_equal(runs.weights_of(path, optimizer=True), uninterrupted)


@pytest.mark.parametrize("saved, loaded", [(ONE, DATA), (DATA, ONE)], ids=str)
def test_a_periodic_save_lets_the_data_parallel_size_change(
    saved: dict, loaded: dict, pool1: WorkerPool, pool2: WorkerPool, tokenizer: str, uninterrupted: dict, tmp_path: Path
) -> None:
    pool = pool_for(saved, pool1, pool2)
    path = pool.run(with_topology, runs.train_and_save, saved, str(tmp_path), tokenizer, 2, final=False)[0]
    pool = pool_for(loaded, pool1, pool2)
    path = pool.run(with_topology, runs.resume_and_save, loaded, path, str(tmp_path), tokenizer, 2, 4)[0]
    runs.assert_equal(runs.weights_of(path, optimizer=True), uninterrupted)


@pytest.mark.parametrize("final", [True, False], ids=["final", "periodic"])
@pytest.mark.parametrize(
    "dtype, distributed_optimizer, reward",
    [
        ("bf16", True, False),
        ("bf16", True, True),  # a decoder in bf16 under a head in fp32: buffers of two number formats
        ("bf16", False, False),
        ("bf16", False, True),
        ("fp32", False, False),
    ],
)
def test_number_formats_and_the_plain_optimizer(
    dtype: str,
    distributed_optimizer: bool,
    reward: bool,
    final: bool,
    pool2: WorkerPool,
    tokenizer: str,
    tmp_path: Path,
) -> None:
    options = {"dtype": dtype, "distributed_optimizer": distributed_optimizer, "reward": reward}
    whole = pool2.run(with_topology, runs.train_and_save, DATA, str(tmp_path / "whole"), tokenizer, 4, **options)[0]
    half = pool2.run(with_topology, runs.train_and_save, DATA, str(tmp_path), tokenizer, 2, final=final, **options)[0]
    resumed = pool2.run(with_topology, runs.resume_and_save, DATA, half, str(tmp_path), tokenizer, 2, 4, **options)[0]
    expected = runs.weights_of(whole, optimizer=True)
    assert (
        expected["decoder.layers.0.mlp.linear_fc1.weight"].dtype
        == {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    )
    assert "optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc1.weight" in expected
    runs.assert_equal(runs.weights_of(resumed, optimizer=True), expected)


def test_the_plain_optimizers_state_loads_under_another_layout(
    pool1: WorkerPool, pool2: WorkerPool, tokenizer: str, tmp_path: Path
) -> None:
    options = {"distributed_optimizer": False}
    [whole] = pool1.run(with_topology, runs.train_and_save, ONE, str(tmp_path / "whole"), tokenizer, 4, **options)
    [half] = pool1.run(with_topology, runs.train_and_save, ONE, str(tmp_path), tokenizer, 2, final=False, **options)
    resumed = pool2.run(with_topology, runs.resume_and_save, TENSOR, half, str(tmp_path), tokenizer, 2, 4, **options)[0]
    runs.assert_equal(runs.weights_of(resumed, optimizer=True), runs.weights_of(whole, optimizer=True))


def refused(topology, path: str, **options) -> str:
    from nemo_align.checkpoint import megatron

    run = runs.build(topology, **options)
    with pytest.raises(ValueError) as caught:
        megatron.load_training(Path(path), run.chunks, run.optimizer, run.scheduler, topology)
    return str(caught.value)


@pytest.mark.parametrize("loaded", [TENSOR, PIPELINE, INTERLEAVED], ids=str)
def test_a_periodic_save_under_another_model_split_is_refused_with_the_remedy(
    loaded: dict, pool1: WorkerPool, pool2: WorkerPool, tokenizer: str, tmp_path: Path
) -> None:
    [path] = pool1.run(with_topology, runs.train_and_save, ONE, str(tmp_path), tokenizer, 1, final=False)
    message = pool2.run(with_topology, refused, loaded, path)[0]
    assert "parallel.tensor=1 parallel.pipeline=1 parallel.virtual_pipeline=1" in message
    assert "checkpoint.init_from" in message


def test_other_refusals_name_the_setting(pool1: WorkerPool, tokenizer: str, tmp_path: Path) -> None:
    [path] = pool1.run(with_topology, runs.train_and_save, ONE, str(tmp_path), tokenizer, 1)
    [message] = pool1.run(with_topology, refused, ONE, path, distributed_optimizer=False)
    assert "parallel.distributed_optimizer=true" in message
    [message] = pool1.run(with_topology, refused, ONE, path, num_layers=5)
    assert "missing in the checkpoint: decoder.layers.4." in message
    [message] = pool1.run(with_topology, refused, ONE, path, num_layers=3)
    assert "in the checkpoint but not in the model: decoder.layers.3." in message
    [message] = pool1.run(with_topology, refused, ONE, path, ffn_hidden_size=128)
    assert "linear_fc1.weight has shape [64, 32], the model's is [128, 32]" in message


def draw(topology) -> list:
    import random

    import numpy as np

    return [random.random(), float(np.random.rand()), torch.rand(3).tolist()]


def save_and_draw(topology, run_dir: str, tokenizer: str) -> tuple[str, list]:
    run = runs.build(topology)
    draw(topology)
    path = runs.save(run, run_dir, 0, tokenizer, final=False)  # before any step: the optimizer has no state yet
    return path, draw(topology)


def load_and_draw(topology, path: str, *, resume: bool) -> list:
    from nemo_align.checkpoint import megatron

    run = runs.build(topology)
    megatron.load_training(Path(path), run.chunks, run.optimizer, run.scheduler if resume else None, topology)
    return draw(topology)


def test_random_states_go_on_where_they_stood(pool2: WorkerPool, tokenizer: str, tmp_path: Path) -> None:
    saved = pool2.run(with_topology, save_and_draw, TENSOR, str(tmp_path), tokenizer)
    path = saved[0][0]
    assert pool2.run(with_topology, load_and_draw, TENSOR, path, resume=True, seed=99) == [drawn for _, drawn in saved]
    taken_over = pool2.run(with_topology, load_and_draw, TENSOR, path, resume=False, seed=99)
    assert all(new != old for new, (_, old) in zip(taken_over, saved, strict=True))  # a new stage keeps its own


def take_over_optimizer(topology, path: str, **options) -> tuple[list, float, float, float]:
    from nemo_align.checkpoint import megatron
    from nemo_align.checkpoint.sharded_state import hyper_parameters

    run = runs.build(topology, **options)
    for group in run.optimizer.param_groups:
        group["max_lr"] = 0.5
    before = hyper_parameters(run.optimizer)
    megatron.load_training(Path(path), run.chunks, run.optimizer, None, topology)
    assert hyper_parameters(run.optimizer) == before
    state = next(iter(run.optimizer.chained_optimizers[0].optimizer.state.values()))
    return before, run.optimizer.param_groups[0]["max_lr"], float(state["step"]), float(state["exp_avg"].abs().sum())


@pytest.mark.parametrize(
    "options",
    [{}, {"distributed_optimizer": False}, {"distributed_optimizer": False, "dtype": "bf16"}],
    ids=["distributed", "plain_fp32", "plain_bf16"],
)
def test_moments_go_into_a_new_stage_without_its_settings(
    options: dict, pool1: WorkerPool, tokenizer: str, tmp_path: Path
) -> None:
    [path] = pool1.run(with_topology, runs.train_and_save, ONE, str(tmp_path), tokenizer, 3, **options)
    [(_, max_lr, count, moment)] = pool1.run(with_topology, take_over_optimizer, ONE, path, **options)
    assert max_lr == 0.5  # 0.01 in the checkpoint
    assert count == 3 and moment > 0


def save_while_rank_0_fails(topology, run_dir: str, tokenizer: str) -> None:
    from nemo_align.checkpoint import store

    run = runs.build(topology)
    if topology.is_main:
        store.publish = None  # not callable: fails on rank 0 only
    runs.save(run, run_dir, 1, tokenizer)


def test_a_failure_on_rank_0_fails_everywhere_and_publishes_nothing(tokenizer: str, tmp_path: Path) -> None:
    pool = WorkerPool(2)
    try:
        with pytest.raises(RemoteError, match="not callable"):
            pool.run(with_topology, save_while_rank_0_fails, DATA, str(tmp_path), tokenizer, timeout=60)
    finally:
        pool.close()
    assert not list((tmp_path / "checkpoints").glob("step_*"))


def newest(topology, run_dir: str) -> str | None:
    from nemo_align.checkpoint import megatron

    found = megatron.newest_resumable(run_dir, topology)
    return None if found is None else found.name


def test_damage_falls_back_to_the_older_one_on_every_rank(pool2: WorkerPool, tokenizer: str, tmp_path: Path) -> None:
    for steps in (1, 2):
        path = pool2.run(with_topology, runs.train_and_save, TENSOR, str(tmp_path), tokenizer, steps)[0]
    assert pool2.run(with_topology, newest, TENSOR, str(tmp_path)) == ["step_0000002"] * 2
    file = Path(path) / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # one bit: the length stays
    file.write_bytes(content)
    assert pool2.run(with_topology, newest, TENSOR, str(tmp_path)) == ["step_0000001"] * 2
    messages = pool2.run(with_topology, refused, TENSOR, path)
    assert all("__1_0.distcp is damaged" in message for message in messages)
