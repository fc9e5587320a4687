"""The learning rate at every step equals its closed form, with positions counted in examples.

The formulas are written out here; nothing of them is asked of Megatron-core or of our own schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from tests.distributed.stage_runs import numbers, run_stage
from tests.stage_inputs import stage_overrides

PEAK, LOWEST = 2e-3, 5e-4


@dataclass(frozen=True)
class Shape:
    """Examples of warm-up, to the end of the decay, and of the final decay of `wsd`."""

    warmup: int
    end: int
    last: int = 0


def rate(schedule: str, examples: int, shape: Shape) -> float:
    """Learning rate of the batch that ends after `examples` examples."""
    if examples <= shape.warmup:
        return PEAK * examples / shape.warmup
    if schedule == "constant":
        return PEAK
    if examples >= shape.end:
        return LOWEST
    done = (examples - shape.warmup) / (shape.end - shape.warmup)
    if schedule == "cosine":
        return LOWEST + (PEAK - LOWEST) * (1 + math.cos(math.pi * done)) / 2
    if schedule == "linear":
        return PEAK + (LOWEST - PEAK) * done
    assert schedule == "wsd"
    return min(PEAK, LOWEST + (PEAK - LOWEST) * (shape.end - examples) / shape.last)


def rates_of_the_scheduler(schedule: str, shape: Shape, batches: list[int]) -> list[tuple[float, float, float]]:
    """In a worker: learning rate of two groups, and weight decay of the second, after each batch."""
    import torch

    from nemo_align.config.training import OptimizerConfig
    from nemo_align.training.optimizer import ScheduleLength, build_scheduler, learning_rate

    config = OptimizerConfig(lr=PEAK, min_lr=LOWEST, schedule=schedule, weight_decay=0.25)
    matrices, norms = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [matrices]}, {"params": [norms], "wd_mult": 0.0}])
    length = ScheduleLength(warmup=shape.warmup, decay=shape.end, wsd_decay=shape.last or None)
    scheduler = build_scheduler(optimizer, config, length)
    found = []
    for size in batches:
        scheduler.step(size)
        first, second = optimizer.param_groups
        assert learning_rate(optimizer) == first["lr"] == second["lr"]
        found.append((first["lr"], first["weight_decay"], second["weight_decay"]))
    return found


@pytest.mark.parametrize("warmup", [0, 7, 20])  # none; ends inside a batch; ends with one
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
def test_the_scheduler_follows_its_closed_form(schedule, warmup, pool1):
    shape = Shape(warmup, end=100, last=30 if schedule == "wsd" else 0)
    batches = [4] * 5 + [10] * 5 + [3] * 9 + [30, 1]  # 100 examples lie inside the batch of 30
    [found] = pool1.run(rates_of_the_scheduler, schedule, shape, batches)
    consumed = 0
    for size, (actual, decay, decay_of_norms) in zip(batches, found, strict=True):
        consumed += size
        assert actual == pytest.approx(rate(schedule, consumed, shape), rel=1e-9), consumed
        assert (decay, decay_of_norms) == (0.25, 0.0)  # matrices only, at every step


# Batches under the ramp: it changes at 480 tokens = 10 samples of 48, inside the third batch, which keeps its size.
SIZES = [4, 4, 4, 8, 8, 8, 8]
STAGES = {
    # schedule -> (overrides, what the closed form is made of); warm-up of two steps is 8 examples
    "constant": ([], Shape(8, end=0)),
    # Stopped after five steps, the schedule keeps the length of its seven.
    "cosine": (["train.max_steps=5"], Shape(8, end=sum(SIZES))),
    "linear": (["optimizer.decay_steps=6"], Shape(8, end=sum(SIZES[:6]))),
    "wsd": (["optimizer.decay_steps=3"], Shape(8, end=sum(SIZES), last=sum(SIZES[4:]))),
}


@pytest.mark.parametrize("schedule", STAGES)
def test_a_stage_with_a_batch_ramp_logs_the_closed_form(schedule, pool1, stage_inputs, tmp_path):
    extra, shape = STAGES[schedule]
    overrides = [
        *stage_overrides(stage_inputs, "pretrain"),
        "data.phases.first.steps=3",
        "data.phases.second.steps=4",
        "train.validate_at_start=false",
        "train.batch_ramp=[{from_tokens:0,global_batch_size:4},{from_tokens:480,global_batch_size:8}]",
        f"optimizer.lr={PEAK}",
        f"optimizer.min_lr={LOWEST}",
        f"optimizer.schedule={schedule}",
        "optimizer.warmup_steps=2",
        *extra,
    ]
    records = numbers(run_stage(pool1, "pretrain", tmp_path, overrides), "train")
    assert len(records) == (5 if schedule == "cosine" else 7)
    consumed = 0
    for size, record in zip(SIZES, records, strict=False):
        consumed += size
        assert record["num_tokens"] == consumed * 48
        assert record["lr"] == pytest.approx(rate(schedule, consumed, shape), rel=1e-9), record["step"]


def test_on_rows_the_position_counts_examples(pool1, stage_inputs, tmp_path):
    """However many tokens or micro-batches a batch has; of a short last batch, those it has."""
    overrides = [
        *stage_overrides(stage_inputs, "sft"),
        "train.max_steps=null",
        "train.epochs=1",  # 33 dialogues in batches of 10: the last has 3
        "train.validate_at_start=false",
        f"optimizer.lr={PEAK}",
        f"optimizer.min_lr={LOWEST}",
        "optimizer.schedule=linear",
        "optimizer.warmup_steps=1",
    ]
    records = numbers(run_stage(pool1, "sft", tmp_path, overrides), "train")
    expected = [rate("linear", consumed, Shape(10, end=33)) for consumed in (10, 20, 30, 33)]
    assert [record["lr"] for record in records] == pytest.approx(expected, rel=1e-9)
