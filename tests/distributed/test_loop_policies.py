"""What the training loop promises besides the numbers of a plain run: when it validates, how batches grow, what
clipping does, what happens at a loss or a gradient that is not finite, what is carried over and what is written at the
end."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.checkpoint_runs import assert_equal
from tests.distributed.pool import RemoteError, with_topology
from tests.distributed.stage_runs import numbers, run_in_worker, run_stage
from tests.stage_inputs import VOCABULARY, StageInputs, stage_overrides


def overrides_of(inputs: StageInputs, verb: str, policy: Path | None, *extra: str) -> list[str]:
    start = [f"checkpoint.init_from={policy}"] if policy else []
    return [*stage_overrides(inputs, verb), *start, *extra]


def weights_of(path: Path, *, optimizer: bool = False) -> dict:
    """All tensors of a checkpoint's model (and optimizer, from a final save) without vocabulary padding."""
    from nemo_align.checkpoint.streaming.torch_dist import TensorReader

    reader = TensorReader(path)
    names = [name for name in reader.names() if optimizer or not name.startswith("optimizer.")]
    rows = ("word_embeddings.weight", "output_layer.weight")
    return {name: reader.read(name)[: VOCABULARY if name.endswith(rows) else None] for name in names}


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:07d}"


@pytest.mark.parametrize(
    "extra, expected",
    [
        (["train.max_steps=5"], [0, 2, 4, 5]),
        (["train.max_steps=4"], [0, 2, 4]),  # due at the last step, which validates anyway: once
        (["train.max_steps=3", "train.validate_at_start=false"], [2, 3]),
    ],
)
def test_held_out_metrics_come_at_the_right_steps(extra, expected, pool1, stage_inputs, policy, tmp_path):
    overrides = overrides_of(stage_inputs, "sft", policy, "train.validate_every=2", *extra)
    records = run_stage(pool1, "sft", tmp_path, overrides)
    assert [record["step"] for record in records if record["kind"] == "validation"] == expected
    order = [(record["step"], record["kind"]) for record in records if record["kind"] != "save"]
    assert order == sorted(order)  # "train" before "validation": a step is measured after its update
    assert [step for step, kind in order if kind == "train"] == list(range(1, expected[-1] + 1))
    losses = [record["validation/rows/loss"] for record in records if record["kind"] == "validation"]
    assert len(set(losses)) == len(losses)  # each of other weights


def test_a_batch_ramp_is_the_same_under_data_parallelism(pool1, pool2, stage_inputs, policy, tmp_path):
    overrides = overrides_of(
        stage_inputs,
        "pretrain",
        policy,
        "data.phases.first.steps=3",
        "data.phases.second.steps=2",
        "train.batch_ramp=[{from_tokens:0,global_batch_size:4},{from_tokens:480,global_batch_size:8}]",
    )
    one = run_stage(pool1, "pretrain", tmp_path / "one", overrides)
    two = run_stage(pool2, "pretrain", tmp_path / "two", overrides, {"data": 2})
    found = numbers(one, "train")
    # 480 tokens = 10 samples: passed inside the third batch of 4, so the fourth is the first of 8.
    assert np.diff([0, *(record["num_tokens"] for record in found)]).tolist() == [4 * 48] * 3 + [8 * 48] * 2
    for expected, actual in zip(found, numbers(two, "train"), strict=True):
        assert actual == pytest.approx(expected, rel=2e-4, abs=2e-5)
        assert actual["loss"] == pytest.approx(expected["loss"], rel=2e-5)
    state = json.loads((checkpoint(tmp_path / "two", 5) / "manifest.json").read_text())["state"]
    assert (state["step"], state["consumed_examples"], state["tokens"]) == (5, 28, 28 * 48)


def distance(before: dict, after: dict) -> float:
    return math.sqrt(sum(float((after[name].double() - before[name].double()).square().sum()) for name in before))


@pytest.mark.parametrize(
    "layout", [{}, {"tensor": 2, "sequence": True}, pytest.param({"pipeline": 2}, marks=pytest.mark.full)], ids=str
)
def test_clipping_bounds_the_update_and_the_log_shows_the_norm_before_it(
    layout, pool1, pool2, stage_inputs, policy, tmp_path
):
    """With eps far above the gradient Adam's first update is lr / eps x gradient, so its length is the gradient's."""
    sgd = ["optimizer.lr=1e3", "optimizer.eps=1e3", "optimizer.weight_decay=0", "train.max_steps=1"]
    before = weights_of(checkpoint(policy, 3))
    lengths, norms = [], []
    for clip in (0, 0.01):
        overrides = overrides_of(stage_inputs, "sft", policy, *sgd, f"optimizer.clip_grad={clip}")
        run_dir = tmp_path / str(clip)
        [record] = numbers(run_stage(pool2 if layout else pool1, "sft", run_dir, overrides, layout), "train")
        norms.append(record["grad_norm"])
        lengths.append(distance(before, weights_of(checkpoint(run_dir, 1))))
    assert norms[0] == norms[1] > 0.1
    assert lengths == pytest.approx([norms[0], 0.01], rel=2e-3)


POISONED_ROW = 3  # of 30; read in the second batch of ten


@pytest.fixture
def poisoned(stage_inputs, policy, tmp_path) -> list[str]:
    """Pairs of equal rewards but for one, under a scale of rewards that puts its squared gap beyond fp32.

    Rows alone cannot do it: rewards that could are refused."""
    rows = [json.loads(line) for line in stage_inputs.rows("pairs").read_text().splitlines()[:30]]
    rows = [
        {**row, "chosen_reward": 1.0, "rejected_reward": float(number != POISONED_ROW)}
        for number, row in enumerate(rows)
    ]
    path = tmp_path / "poisoned.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return overrides_of(
        stage_inputs,
        "preference",
        policy,
        f"data.train.rows.path={path}",
        "preference.preference_loss=rpo_sq",
        "preference.gt_reward_scale=1e20",
        "checkpoint.save_every=1",
        "checkpoint.keep_last=9",
    )


@pytest.mark.parametrize(
    "layout",
    [pytest.param({}, marks=pytest.mark.full), pytest.param({"pipeline": 2}, marks=pytest.mark.full), {"data": 2}],
    ids=str,
)
def test_a_loss_that_is_not_finite_is_skipped_if_asked_for(layout, pool1, pool2, poisoned, tmp_path):
    overrides = [*poisoned, "train.nonfinite=skip"]
    records = run_stage(pool2 if layout else pool1, "preference", tmp_path / "run", overrides, layout)
    train = numbers(records, "train")
    assert ["loss" in record.get("nonfinite", ()) for record in train] == [False, True, False]
    assert train[1]["loss"] is None and math.isfinite(train[2]["loss"]) and math.isfinite(train[2]["grad_norm"])
    first, second, third = (checkpoint(tmp_path / "run", step) for step in (1, 2, 3))
    assert_equal(weights_of(second), weights_of(first))
    assert distance(weights_of(second), weights_of(third)) > 0
    state = json.loads((third / "manifest.json").read_text())["state"]
    assert (state["step"], state["skipped_steps"], state["consumed_examples"]) == (3, 1, 30)


@pytest.mark.parametrize("layout", [pytest.param({}, marks=pytest.mark.full), {"pipeline": 2}], ids=str)
def test_a_loss_that_is_not_finite_stops_before_the_update(layout, pool1, pool2, poisoned, tmp_path):
    with pytest.raises(RemoteError) as caught:
        run_stage(pool2 if layout else pool1, "preference", tmp_path / "run", poisoned, layout)
    assert caught.value.type_name == "ValueError"
    message = str(caught.value)
    assert "step 2: loss inf" in message and "stopped before the update; the last checkpoint is good" in message
    assert "train.nonfinite=skip" in message
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_0000001"]
    assert not (tmp_path / "run" / "result.json").exists()


def test_skipping_has_a_limit(pool1, poisoned, tmp_path):
    """Counted in a row: a model that diverged gives nothing finite any more, and would be skipped for ever."""
    overrides = [*poisoned, "train.nonfinite=skip", "train.nonfinite_limit=2"]
    assert len(numbers(run_stage(pool1, "preference", tmp_path / "once", overrides), "train")) == 3
    path = tmp_path / "all.jsonl"
    rows = [json.loads(line) for line in (tmp_path / "poisoned.jsonl").read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "rejected_reward": 0.0}) + "\n" for row in rows))
    with pytest.raises(RemoteError) as caught:
        run_stage(pool1, "preference", tmp_path / "always", [*overrides, f"data.train.rows.path={path}"])
    assert "step 2: loss inf" in str(caught.value) and "2 steps in a row were not finite" in str(caught.value)


@pytest.fixture
def steep(poisoned) -> list[str]:
    """The same pairs; fp32 holds the square of the gap under this scale, but not that of its gradient at this beta."""
    return [*poisoned, "preference.gt_reward_scale=1e18", "preference.ref_policy_kl_penalty=1e4"]


@pytest.mark.parametrize(
    "layout",
    [pytest.param({}, marks=pytest.mark.full), pytest.param({"tensor": 2}, marks=pytest.mark.full), {"data": 2}],
    ids=str,
)
def test_a_gradient_that_is_not_finite_is_skipped_whatever_the_loss(layout, pool1, pool2, steep, tmp_path):
    overrides = [*steep, "train.nonfinite=skip"]
    records = run_stage(pool2 if layout else pool1, "preference", tmp_path / "run", overrides, layout)
    train = numbers(records, "train")
    assert [record.get("nonfinite", []) for record in train] == [[], ["grad_norm"], []]
    assert train[1]["grad_norm"] is None and 1e34 < train[1]["loss"] < math.inf
    first, second, third = (checkpoint(tmp_path / "run", step) for step in (1, 2, 3))
    assert_equal(weights_of(second), weights_of(first))
    assert distance(weights_of(second), weights_of(third)) > 0
    assert all(bool(value.isfinite().all()) for value in weights_of(third, optimizer=True).values())
    state = json.loads((third / "manifest.json").read_text())["state"]
    assert (state["step"], state["skipped_steps"], state["consumed_examples"]) == (3, 1, 30)


@pytest.mark.parametrize("layout", [pytest.param({}, marks=pytest.mark.full), {"pipeline": 2}], ids=str)
def test_a_gradient_that_is_not_finite_stops_before_the_update(layout, pool1, pool2, steep, tmp_path):
    with pytest.raises(RemoteError) as caught:
        run_stage(pool2 if layout else pool1, "preference", tmp_path / "run", steep, layout)
    assert caught.value.type_name == "ValueError"
    [loss, norm] = re.findall(r"step 2: loss (\S+), gradient norm (\S+):", str(caught.value))[0]
    assert math.isfinite(float(loss)) and float(norm) == math.inf
    assert "stopped before the update; the last checkpoint is good" in str(caught.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_0000001"]


@pytest.mark.parametrize(
    "layout",
    [pytest.param({}, marks=pytest.mark.full), pytest.param({"tensor": 2}, marks=pytest.mark.full), {"data": 2}],
    ids=str,
)
def test_adams_moments_are_carried_over_if_asked_for(layout, pool1, pool2, stage_inputs, policy, tmp_path):
    """The first gradient g is the same: moments from zero are (1 - beta) g, carried over they have beta m0 besides."""
    pool = pool2 if layout else pool1
    overrides = overrides_of(stage_inputs, "sft", policy, "train.max_steps=1", "optimizer.clip_grad=0")
    run_stage(pool, "sft", tmp_path / "fresh", overrides, layout)
    run_stage(pool, "sft", tmp_path / "carried", [*overrides, "checkpoint.load_optimizer=true"], layout)
    before, fresh, carried = (
        weights_of(path, optimizer=True)
        for path in (checkpoint(policy, 3), checkpoint(tmp_path / "fresh", 1), checkpoint(tmp_path / "carried", 1))
    )
    for moment, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.95)):
        names = [name for name in before if f".{moment}." in name]
        assert len(names) > 20
        assert any(float(before[name].abs().max()) > 0 for name in names)
        for name in names:
            expected = (beta * before[name] + fresh[name]).numpy()
            largest = float(np.abs(expected).max())
            np.testing.assert_allclose(carried[name].numpy(), expected, rtol=1e-4, atol=1e-6 * largest, err_msg=name)
    weights = [name for name in before if not name.startswith("optimizer.")]
    assert distance({n: fresh[n] for n in weights}, {n: carried[n] for n in weights}) > 1e-4


def test_an_export_at_the_end_has_a_card_with_the_results(pool1, stage_inputs, policy, tmp_path):
    run_stage(pool1, "sft", tmp_path, overrides_of(stage_inputs, "sft", policy, "checkpoint.export_hf=true"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["hf"] == "hf"
    card = (tmp_path / "hf" / "README.md").read_text()
    for when in ("first", "last"):
        assert f"| validation/rows/loss ({when}) | {result[when]['validation/rows/loss']:.6g} |" in card
    assert f"| tokens | {result['tokens']} |" in card and "supervised fine-tuning, step 3" in card
    assert "optimizer:\n  lr: 0.001" in card  # the run's configuration
    assert (tmp_path / "hf" / "chat_template.jinja").is_file() and (tmp_path / "hf" / "config.json").is_file()


def run_deterministically(topology, verb: str, config_path: str) -> None:
    """In a worker: torch then raises an error at an operation without a deterministic form."""
    import torch

    torch.use_deterministic_algorithms(True)
    try:
        run_in_worker(topology, verb, config_path)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("verb", ["reward", "preference"])
def test_every_operation_has_a_deterministic_form(verb, pool1, stage_inputs, policy, tmp_path):
    from nemo_align.config.compose import compose, to_yaml
    from nemo_align.training.metrics import read_metrics

    settings = ["precision=fp32", "runtime.deterministic=true", "train.max_steps=2"]
    runs = []
    for name in ("first", "second"):
        run_dir = tmp_path / name
        config = compose(verb, [*overrides_of(stage_inputs, verb, policy), *settings, f"run_dir={run_dir}"])
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text(to_yaml(config))
        pool1.run(with_topology, run_deterministically, {}, verb, str(run_dir / "config.yaml"))
        runs.append(read_metrics(run_dir))
    assert numbers(runs[0], "train") == numbers(runs[1], "train")
    assert_equal(*(weights_of(checkpoint(tmp_path / name, 2), optimizer=True) for name in ("first", "second")))


def test_the_setting_reaches_torch(tmp_path):
    """In a process of its own: the pool's workers have joined their group, which is when it is set."""
    code = (
        "import torch; from nemo_align.runtime import device, topology; device.install();"
        "from nemo_align.config.runtime import ParallelConfig, RuntimeConfig;"
        "from nemo_align.runtime.launch_environment import LaunchEnvironment;"
        "runtime = RuntimeConfig(deterministic=True, threads=1);"
        f"alone = LaunchEnvironment(0, 1, 0, 1, 'file://{tmp_path}/store', 'local');"
        "topology.initialize(ParallelConfig(), runtime, alone);"
        "print(torch.are_deterministic_algorithms_enabled()); topology.destroy()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split()[-1:] == ["True"], done.stderr


def test_a_new_reward_head_starts_at_the_mean_label(pool1, stage_inputs, policy, tmp_path):
    extra = ["reward.head_init_std=0.001", "train.max_steps=1"]
    overrides = overrides_of(stage_inputs, "reward", policy, *extra)
    first = numbers(run_stage(pool1, "reward", tmp_path / "mean", overrides), "validation")[0]
    train, held_out = (
        [json.loads(line) for line in stage_inputs.rows(name).read_text().splitlines()]
        for name in ("rated", "rated_held_out")
    )
    overrides = [*overrides, "reward.head_bias_from_labels=false"]
    from_zero = numbers(run_stage(pool1, "reward", tmp_path / "zero", overrides), "validation")[0]
    for attribute in ("clarity", "safety"):
        mean = np.mean([row[attribute] for row in train if row[attribute] is not None])
        labels = np.array([row[attribute] for row in held_out if row[attribute] is not None])
        key = f"validation/rows/mae/{attribute}"
        assert first[key] == pytest.approx(np.abs(labels - mean).mean(), rel=0.02)
        assert first[f"validation/rows/mae_of_mean/{attribute}"] == pytest.approx(
            np.abs(labels - mean).mean(), rel=1e-5
        )
        assert from_zero[key] == pytest.approx(np.abs(labels).mean(), rel=0.02)


@pytest.mark.parametrize("verb, ranks, rows", [("sft", 3, 1), ("reward", 3, 2), ("preference", 2, 1)])
@pytest.mark.parametrize("length", [["train.epochs=1"], ["train.epochs=2.5"], ["train.max_steps=2"]], ids=str)
def test_fewer_rows_than_ranks_or_than_a_batch(verb, ranks, rows, length, pools, stage_inputs, policy, tmp_path):
    """One epoch is one short batch, in which ranks have nothing to do; batches of more go over the rows again. Each
    row counts once in its batch: the numbers are those of one rank. One held-out row leaves ranks without work too."""
    kind = {"sft": "dialogues", "reward": "rated", "preference": "pairs"}[verb]
    for split, name, count in (("train", kind, rows), ("validation", f"{kind}_held_out", 1)):
        lines = stage_inputs.rows(name).read_text().splitlines(keepends=True)
        (tmp_path / f"{split}.jsonl").write_text("".join(lines[:count]))
    own = [f"data.{split}.rows.path={tmp_path}/{split}.jsonl" for split in ("train", "validation")]
    overrides = overrides_of(stage_inputs, verb, policy, *own, *length)
    overrides = [text for text in overrides if text != "train.max_steps=3"]
    one = run_stage(pools(1), verb, tmp_path / "one", overrides)
    many = run_stage(pools(ranks), verb, tmp_path / "many", overrides, {"data": ranks})
    steps = {"train.epochs=1": 1, "train.epochs=2.5": 1, "train.max_steps=2": 2}[length[0]]
    assert [record["step"] for record in numbers(many, "train")] == list(range(1, steps + 1))
    assert len(numbers(many, "validation")) == 2
    for record in ("train", "validation"):
        for expected, actual in zip(numbers(one, record), numbers(many, record), strict=True):
            assert actual == pytest.approx(expected, rel=2e-4, abs=2e-5, nan_ok=True)
    for name, weights in weights_of(checkpoint(tmp_path / "one", steps)).items():
        found = weights_of(checkpoint(tmp_path / "many", steps))[name]
        assert float((found - weights).abs().max()) <= 2e-5, name  # of updates of up to 1e-3
