"""The learning-rate schedules against torch.optim.lr_scheduler, and transformers' for warmup-stable-decay.

A schedule of torch gives the rate of the first step at its position 0; ours counts the batch that the step is about to
apply, so its first step stands at position 1 and warm-up never gives a rate of 0. Position for position they agree.
tests/distributed/test_learning_rates.py has the closed forms for batches of several sizes.
"""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

PEAK, LOWEST, STEPS = 2e-3, 5e-4, 60


def rates_of_ours(schedule: str, warmup: int, last: int | None, batch: int) -> list[float]:
    """In a worker: the rate of every step, with `batch` examples in each."""
    from nemo_align.config.training import OptimizerConfig
    from nemo_align.training.optimizer import ScheduleLength, build_scheduler, learning_rate

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 2))])
    length = ScheduleLength(warmup * batch, STEPS * batch, last and last * batch)
    settings = OptimizerConfig(lr=PEAK, min_lr=LOWEST, schedule=schedule)
    scheduler = build_scheduler(optimizer, settings, length)
    found = []
    for _ in range(STEPS):
        scheduler.step(batch)
        found.append(learning_rate(optimizer))
    return found


def decay_of_torch(schedule: str, optimizer: torch.optim.Optimizer, steps: int) -> schedulers.LRScheduler:
    """What follows the warm-up, over `steps` steps."""
    if schedule == "constant":
        return schedulers.ConstantLR(optimizer, factor=1.0)
    if schedule == "cosine":
        return schedulers.CosineAnnealingLR(optimizer, T_max=steps, eta_min=LOWEST)
    assert schedule == "linear"
    return schedulers.LinearLR(optimizer, start_factor=1.0, end_factor=LOWEST / PEAK, total_iters=steps)


def rates_of_torch(schedule: str, warmup: int) -> list[float]:
    """Rates at positions 1 .. STEPS."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 2))], lr=PEAK)
    scheduler = decay_of_torch(schedule, optimizer, STEPS - warmup)
    if warmup:
        # LinearLR cannot start from 0.
        rising = schedulers.LambdaLR(optimizer, lambda position: position / warmup)
        scheduler = schedulers.SequentialLR(optimizer, [rising, scheduler], milestones=[warmup])
    found = []
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("warmup", [0, 1, 12])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_rates_equal_torch(schedule, warmup, pool1):
    [ours] = pool1.run(rates_of_ours, schedule, warmup, None, 8)
    theirs = rates_of_torch(schedule, warmup)
    print(f"parity: {schedule}: worst relative {max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)):.1e}")
    assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("warmup", [0, 12])
def test_wsd_rates_equal_transformers(warmup, pool1):
    from transformers import get_wsd_schedule

    last = 20
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 2))], lr=PEAK)
    scheduler = get_wsd_schedule(
        optimizer,
        num_warmup_steps=warmup,
        num_decay_steps=last,
        num_stable_steps=STEPS - warmup - last,
        min_lr_ratio=LOWEST / PEAK,
        decay_type="linear",
    )
    theirs = []
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step()
        theirs.append(optimizer.param_groups[0]["lr"])
    [ours] = pool1.run(rates_of_ours, "wsd", warmup, last, 8)
    # Their warm-up rises from the lowest rate, ours from 0: the same from where it ends.
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-9)
    assert ours[STEPS - last - 1] == PEAK and ours[-1] == pytest.approx(LOWEST)
