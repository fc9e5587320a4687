"""N steps = k steps + an end without warning + a resume + N-k steps: to the last bit on the same layout.

The runs go through the stages' entry points. They end where the trainer asks whether to stop, once per step or batch:
by an exception there (nothing is saved, as after SIGKILL, which tests/faults sends to real processes) or by a stop
(all is saved). Batches of 10 out of 33 rows: step 4 crosses the border of an epoch.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.checkpoint_runs import assert_equal, weights_of
from tests.distributed.pool import RemoteError, WorkerPool, with_topology
from tests.distributed.stage_runs import numbers
from tests.stage_inputs import MODEL, StageInputs, stage_overrides


class Crash(Exception):
    """Ends a run as abruptly as an exception can."""


@dataclass(frozen=True)
class End:
    """`after`: how many times the run may ask whether to stop before this happens."""

    after: int
    crash: bool = True


@dataclass(frozen=True)
class Case:
    verb: str
    layout: dict[str, Any]
    extra: tuple[str, ...]
    ends: tuple[End, ...]  # of one process after another; the next one resumes


FAST = ("sft_packed", "pretrain_ramp", "reward", "dpo")  # in `make test`; the others in `make test-full`
EIGHT = "train.max_steps=8"
RAMP = "train.batch_ramp=[{from_tokens:0,global_batch_size:4},{from_tokens:480,global_batch_size:8}]"
CASES = {
    # Before the first save, in the middle of an epoch, and just behind a save; then a stop.
    "sft_packed": Case("sft", {}, (EIGHT,), (End(2), End(5), End(1, crash=False))),
    "sft_unpacked": Case(
        "sft",
        {"tensor": 2, "sequence": True},
        (EIGHT, "train.packing=false", "train.micro_batch_size=2"),
        (End(4), End(2)),
    ),
    # The ramp's border (480 tokens, inside the third batch) and the border of the phases (step 4).
    "pretrain_ramp": Case(
        "pretrain",
        {"data": 2},
        ("data.phases.first.steps=4", "data.phases.second.steps=4", RAMP),
        (End(3), End(2, crash=False), End(2)),
    ),
    "reward": Case("reward", {"pipeline": 2}, (EIGHT,), (End(5), End(1))),
    # 5 batches of the reference pass come before the first step: two ends fall into it.
    "dpo": Case(
        "preference",
        {"data": 2},
        (EIGHT, "preference.sft_loss_weight=0.01"),
        (End(2), End(1, crash=False), End(8), End(1)),
    ),
    "rpo": Case(
        "preference",
        {"pipeline": 2, "virtual_pipeline": 2},
        (EIGHT, "preference.preference_loss=rpo_bwd_kl"),
        (End(10), End(3, crash=False)),
    ),
    "bf16_overlap": Case(
        "sft",
        {"data": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
        (EIGHT, "precision.dtype=bf16", "train.validate_every=3"),
        (End(5), End(1, crash=False)),
    ),
}


def run_until(topology: Any, verb: str, config_path: str, end: End | None) -> None:
    """In a worker: one rank of a stage, until `end`."""
    from nemo_align.config.compose import load_resolved
    from nemo_align.runtime.signals import StopRequest

    class Ending(StopRequest):
        asked = 0

        def leave_if_agreed(self, topology: Any) -> None:
            """Not during the start: what comes before the first step or batch is the same for every start."""

        @property
        def requested(self) -> bool:
            # The agreement of a step or batch asks; so do loops of the start, as often as their data are long.
            if sys._getframe(1).f_code.co_name != "agreed":
                return False
            self.asked += 1
            if end is None or self.asked <= end.after:
                return False
            if end.crash:
                raise Crash
            return True

    run = importlib.import_module(f"nemo_align.stages.{verb}").run
    run(load_resolved(verb, config_path), topology, Ending())


@dataclass
class Run:
    """The same configuration under any layout, in one run directory."""

    verb: str
    run_dir: Path
    overrides: list[str]

    def start(self, pool: WorkerPool, layout: dict[str, Any], end: End | None = None) -> None:
        from nemo_align.config.compose import compose, to_yaml

        parallel = [f"parallel.{key}={str(value).lower()}" for key, value in layout.items()]
        config = compose(self.verb, [*self.overrides, *parallel, f"run_dir={self.run_dir}"])
        path = self.run_dir / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_yaml(config))
        if end is None:
            pool.run(with_topology, run_until, layout, self.verb, str(path), None)
            return
        with pytest.raises(RemoteError) as caught:
            pool.run(with_topology, run_until, layout, self.verb, str(path), end)
        assert caught.value.type_name == ("Crash" if end.crash else "SystemExit"), caught.value

    def records(self) -> list[dict]:
        from nemo_align.training.metrics import read_metrics

        return read_metrics(self.run_dir)

    def steps(self) -> list[dict[str, float]]:
        return numbers(self.records(), "train")

    def weights(self) -> dict:
        return weights_of(self.run_dir / "checkpoints" / "step_0000008", optimizer=True)


def make_run(case: Case, inputs: StageInputs, policy: Path, run_dir: Path, *extra: str) -> Run:
    precision = [text for text in MODEL if text.startswith("precision")]
    overrides = [*precision, *stage_overrides(inputs, case.verb), f"checkpoint.init_from={policy}"]
    overrides += ["checkpoint.save_every=3", "train.validate_at_start=false", *case.extra, *extra]
    return Run(case.verb, run_dir, overrides)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.full) for name in CASES]
)
def test_a_resumed_run_ends_as_an_undisturbed_one(name, pool1, pool2, stage_inputs, policy, tmp_path):
    case = CASES[name]
    pool = pool2 if case.layout else pool1
    whole = make_run(case, stage_inputs, policy, tmp_path / "whole")
    whole.start(pool, case.layout)
    parts = make_run(case, stage_inputs, policy, tmp_path / "parts")
    for end in case.ends:
        parts.start(pool, case.layout, end)
    parts.start(pool, case.layout)
    assert len(whole.steps()) == 8
    assert parts.steps() == whole.steps()
    assert numbers(parts.records(), "validation") == numbers(whole.records(), "validation")
    assert_equal(parts.weights(), whole.weights())
    results = [json.loads((run.run_dir / "result.json").read_text()) for run in (parts, whole)]
    for name in ("steps", "examples", "tokens", "first", "last"):
        assert results[0][name] == results[1][name], name
    validated = [result["forward_only"]["validation"]["tokens"] for result in results]
    assert validated[0] == validated[1]  # of all processes of the run


@pytest.mark.parametrize("layout", [pytest.param({}, marks=pytest.mark.full), {"data": 2}], ids=str)
def test_scoring_goes_on_where_it_stopped(layout, pool1, pool2, stage_inputs, policy, tmp_path):
    """520 responses are three batches; what was scored before the end is not scored again."""
    pool = pool2 if layout else pool1
    reward = Run("reward", tmp_path / "reward", make_run(CASES["reward"], stage_inputs, policy, tmp_path).overrides)
    reward.start(pool1, {})
    rows = [json.loads(line) for line in stage_inputs.rows("pairs").read_text().splitlines()][:26]
    many = [{**row, "prompt": f"{row['prompt']} {number}"} for number in range(10) for row in rows]
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in many))
    overrides = [f"inputs.many={path}", "data.sequence_length=256", f"checkpoint.init_from={reward.run_dir}"]
    overrides += [text for text in MODEL if text.startswith("precision")]
    whole, parts = (Run("score", tmp_path / name, overrides) for name in ("whole", "parts"))
    whole.start(pool, layout)
    known = []
    for end in (End(1), End(1, crash=False), None):
        parts.start(pool, layout, end)
        found = [np.load(part)["fingerprints"] for part in (parts.run_dir / "cache").glob("scores/*/part_*.npz")]
        known.append(sum(len(fingerprints) for fingerprints in found))
    assert known == [256, 512, 520]  # nothing twice
    assert (parts.run_dir / "many.jsonl").read_bytes() == (whole.run_dir / "many.jsonl").read_bytes()


@pytest.mark.parametrize("any_layout", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_layout_may_change_between_saves(any_layout, pool1, pool2, stage_inputs, policy, tmp_path):
    """Another data-parallel size after any save, another TP and PP after fully reshardable ones: the same examples in
    the same order, so the same losses to rounding (fp32 sums in another order, carried on by the updates)."""
    if any_layout:
        layouts = [{"data": 2}, {"tensor": 2, "sequence": True}, {}, {"pipeline": 2, "virtual_pipeline": 2}]
        extra = ["checkpoint.fully_reshardable=true"]
    else:
        layouts, extra = [{"data": 2}, {}, {"data": 2}, {}], []
    case = CASES["dpo"]
    whole = make_run(case, stage_inputs, policy, tmp_path / "whole")
    whole.start(pool1, {})
    parts = make_run(case, stage_inputs, policy, tmp_path / "parts", *extra)
    for layout, end in zip(layouts, [End(5 + 4), End(2, crash=False), End(2, crash=False), None], strict=True):
        parts.start(pool2 if layout else pool1, layout, end)
    for before, after in zip(whole.steps(), parts.steps(), strict=True):
        if after["step"] == 1:  # policy = reference: every margin is zero but for rounding, which decides the sign
            assert before.pop("rewards/accuracies") == pytest.approx(after.pop("rewards/accuracies"), abs=0.5)
        assert after == pytest.approx(before, rel=2e-4, abs=2e-5)
        assert after["loss"] == pytest.approx(before["loss"], rel=2e-5, abs=2e-6)
    assert [step["num_tokens"] for step in parts.steps()] == [step["num_tokens"] for step in whole.steps()]


def test_a_layout_that_a_periodic_save_cannot_serve_is_refused(pool1, pool2, stage_inputs, policy, tmp_path):
    case = CASES["sft_packed"]
    run = make_run(case, stage_inputs, policy, tmp_path)
    run.start(pool1, {}, End(4))
    with pytest.raises(RemoteError) as caught:
        run.start(pool2, {"tensor": 2})
    message = str(caught.value)
    assert caught.value.type_name == "ValueError" and "is a periodic save under parallel.tensor=1" in message
    assert "Resume with parallel.tensor=1" in message
    run.start(pool1, {})
    assert len(run.steps()) == 8
