"""How long a micro-batch is, by verb and precision."""

import pytest

from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.config.stages import (
    PreferenceStageConfig,
    PretrainStageConfig,
    RewardStageConfig,
    ScoreStageConfig,
    SftStageConfig,
)
from nemo_align.training.step_layout import micro_batch_capacity, padded


@pytest.mark.parametrize(
    ("kind", "train", "expected"),
    [
        (PretrainStageConfig, {}, 100),
        (SftStageConfig, {}, 100),
        (SftStageConfig, {"micro_batch_tokens": 250}, 250),
        (RewardStageConfig, {"packing": False}, 100),
        (PreferenceStageConfig, {}, 200),
        (PreferenceStageConfig, {"packing": False}, 200),
        (PreferenceStageConfig, {"micro_batch_tokens": 250}, 250),
        (ScoreStageConfig, {}, 100),
    ],
)
def test_tokens_of_a_micro_batch(kind, train, expected):
    config = kind()
    config.data.sequence_length = 100
    for name, value in train.items():
        setattr(config.train, name, value)
    assert micro_batch_capacity(config) == expected


def test_scoring_has_a_key_of_its_own():
    config = ScoreStageConfig(micro_batch_tokens=300)
    config.data.sequence_length = 100
    assert micro_batch_capacity(config) == 300


@pytest.mark.parametrize(
    ("fp8", "tensor", "sequence", "expected"),
    [("none", 8, False, 1001), ("none", 8, True, 1008), ("delayed", 4, True, 1024), ("blockwise", 1, False, 1024)],
)
def test_lengths_are_padded_to_what_the_kernels_need(fp8, tensor, sequence, expected):
    assert padded(1001, ParallelConfig(tensor=tensor, sequence=sequence), PrecisionConfig(fp8=fp8)) == expected
