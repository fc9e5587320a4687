"""`score` gives the same rewards under every layout, and from the exported Hugging Face folder of the reward model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.stage_runs import run_stage
from tests.stage_inputs import stage_overrides

LAYOUTS = {
    "tp2_sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2_vp2": {"pipeline": 2, "virtual_pipeline": 2},
    "dp2": {"data": 2},
}
ATTRIBUTES = {"clarity": 1.0, "safety": 0.5}  # and their weights in the scalar reward
# Name of the input -> names of a row's responses in what is written.
RESPONSES = {"pairs": ("chosen_", "rejected_"), "dialogues": ("",)}


@pytest.fixture(scope="module")
def reward_model(pool1, stage_inputs, policy, tmp_path_factory) -> Path:
    """Run directory of a reward model, trained far enough that its scores differ from row to row."""
    run_dir = tmp_path_factory.mktemp("reward_model")
    settings = ["train.max_steps=4", "optimizer.lr=3e-3", "optimizer.eps=1e-8", "checkpoint.export_hf=true"]
    overrides = [*stage_overrides(stage_inputs, "reward"), *settings, f"checkpoint.init_from={policy}"]
    run_stage(pool1, "reward", run_dir, overrides)
    return run_dir


def scored(pool, run_dir: Path, stage_inputs, init_from: Path, layout: dict | None = None, *extra: str) -> dict:
    """Rows that `score` wrote, by input."""
    inputs = [f"inputs.{name}={stage_inputs.rows(name)}" for name in RESPONSES]
    settings = ["data.sequence_length=256", f"data.tokenizer={stage_inputs.tokenizer}"]
    run_stage(pool, "score", run_dir, [*inputs, *settings, f"checkpoint.init_from={init_from}", *extra], layout)
    return {
        name: [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()] for name in RESPONSES
    }


def scores(rows: list[dict], name: str) -> np.ndarray:
    """[rows, responses, attributes]"""
    return np.array(
        [[[row[f"{response}scores"][key] for key in ATTRIBUTES] for response in RESPONSES[name]] for row in rows]
    )


@pytest.fixture(scope="module")
def one_process(pool1, stage_inputs, reward_model, tmp_path_factory) -> dict:
    return scored(pool1, tmp_path_factory.mktemp("one_process"), stage_inputs, reward_model)


@pytest.mark.parametrize("name", RESPONSES)
def test_every_row_stays_in_its_place_with_its_rewards(name, one_process, stage_inputs):
    rows = [json.loads(line) for line in stage_inputs.rows(name).read_text().splitlines()]
    found = one_process[name]
    added = {f"{response}{what}" for response in RESPONSES[name] for what in ("scores", "reward")}
    assert len(found) == len(rows)
    for before, after in zip(rows, found, strict=True):
        assert after.keys() == before.keys() | added
        assert all(after[key] == value for key, value in before.items() if key not in added)
        for response in RESPONSES[name]:
            total = sum(weight * after[f"{response}scores"][key] for key, weight in ATTRIBUTES.items())
            assert after[f"{response}reward"] == pytest.approx(total, rel=1e-9)
    # The model tells rows apart by far more than the layouts may differ.
    assert scores(found, name).std(axis=(0, 1)).min() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_nothing_but_rounding(layout, pool2, stage_inputs, reward_model, one_process, tmp_path):
    found = scored(pool2, tmp_path, stage_inputs, reward_model, LAYOUTS[layout])
    for name, rows in one_process.items():
        np.testing.assert_allclose(scores(found[name], name), scores(rows, name), rtol=1e-5, atol=1e-5)


def test_packing_changes_nothing_but_rounding(pool1, stage_inputs, reward_model, one_process, tmp_path):
    found = scored(pool1, tmp_path, stage_inputs, reward_model, None, "micro_batch_tokens=700")
    for name, rows in one_process.items():
        np.testing.assert_allclose(scores(found[name], name), scores(rows, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [None, {"tensor": 2, "sequence": True}], ids=str)
def test_the_exported_model_scores_the_same(layout, pool1, pool2, stage_inputs, reward_model, one_process, tmp_path):
    found = scored(pool2 if layout else pool1, tmp_path, stage_inputs, reward_model / "hf", layout)
    for name, rows in one_process.items():
        np.testing.assert_allclose(scores(found[name], name), scores(rows, name), rtol=1e-4, atol=1e-4)


def test_the_scores_are_those_that_training_measured(pool1, stage_inputs, reward_model, tmp_path):
    """Scoring the held-out rows of the reward model's own training gives the errors of its last validation."""
    rows = stage_inputs.rows("rated_held_out")
    settings = ["data.sequence_length=96", f"inputs.rated={rows}", f"checkpoint.init_from={reward_model}"]
    run_stage(pool1, "score", tmp_path, settings)
    found = [json.loads(line) for line in (tmp_path / "rated.jsonl").read_text().splitlines()]
    result = json.loads((reward_model / "result.json").read_text())
    for attribute in ATTRIBUTES:
        errors = [abs(row["scores"][attribute] - row[attribute]) for row in found if row[attribute] is not None]
        assert np.mean(errors) == pytest.approx(result["last"][f"validation/rows/mae/{attribute}"], abs=1e-5)
