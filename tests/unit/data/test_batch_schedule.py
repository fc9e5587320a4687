"""The global batch size and its ramp: what is consumed decides, so that a resumed run continues it."""

import pytest

from nemo_align.config.training import BatchRampConfig, TrainConfig
from nemo_align.data.batch_schedule import BatchSchedule

REPORT_RAMP = [
    BatchRampConfig(from_tokens=0, global_batch_size=768),
    BatchRampConfig(from_tokens=200e9, global_batch_size=1536),
    BatchRampConfig(from_tokens=400e9, global_batch_size=2304),
]


def walk(schedule: BatchSchedule, steps: int) -> list[int]:
    """Batch sizes one after another, as the loop asks for them."""
    sizes, consumed = [], 0
    for _ in range(steps):
        sizes.append(schedule.batch_size(consumed))
        consumed += sizes[-1]
    return sizes


def test_the_reports_ramp_changes_at_its_thresholds():
    # 200e9 and 400e9 tokens of 4096: samples 48,828,125 and 97,656,250 (megatron.md section 4 derives the same).
    schedule = BatchSchedule(TrainConfig(global_batch_size=2304, batch_ramp=REPORT_RAMP), tokens_per_example=4096)
    assert schedule.batch_size(48_828_124) == 768
    assert schedule.batch_size(48_828_125) == 1536
    assert schedule.batch_size(97_656_249) == 1536
    assert schedule.batch_size(97_656_250) == 2304
    # A batch that begins before a threshold keeps its size: the 63,579th of 768 is the one that passes 48,828,125.
    assert schedule.batch_size(schedule.examples_after(63_578)) == 768
    assert schedule.batch_size(schedule.examples_after(63_579)) == 1536


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 5, 9, 10, 11, 40])
def test_closed_form_equals_the_walk(steps):
    ramp = [
        BatchRampConfig(from_tokens=0, global_batch_size=3),
        BatchRampConfig(from_tokens=100, global_batch_size=5),
        BatchRampConfig(from_tokens=101, global_batch_size=7),  # passed in the middle of a batch
        BatchRampConfig(from_tokens=400, global_batch_size=11),
    ]
    schedule = BatchSchedule(TrainConfig(global_batch_size=11, batch_ramp=ramp), tokens_per_example=10)
    sizes = walk(schedule, steps)
    assert schedule.examples_after(steps) == sum(sizes)
    assert schedule.steps_for(sum(sizes)) == steps
    if steps:
        assert schedule.steps_for(sum(sizes) - 1) == steps  # a short last batch is a step too


def test_without_a_ramp_every_batch_is_equal():
    schedule = BatchSchedule(TrainConfig(global_batch_size=8))
    assert walk(schedule, 5) == [8] * 5
    assert (schedule.examples_after(5), schedule.steps_for(40), schedule.steps_for(41)) == (40, 5, 6)


def test_a_ramp_needs_samples_of_one_length():
    with pytest.raises(ValueError, match="pretrain only"):
        BatchSchedule(TrainConfig(global_batch_size=8, batch_ramp=REPORT_RAMP))
