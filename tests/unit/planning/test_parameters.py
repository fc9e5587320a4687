"""Parameters per stage and chunk in closed form, and the same counted from the real model."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_align.config.model_file import read_model
from nemo_align.config.runtime import ParallelConfig
from nemo_align.model.counts import count_parameters
from nemo_align.planning.parameters import (
    RewardHeadSize,
    chunk_parameters,
    stage_chunks,
    stage_parameters,
    total_parameters,
)
from tests.fresh_process import answer
from tests.unit.model.configs import tiny_model

N340 = read_model("nemotron4_340b")
PAPER = ParallelConfig(tensor=8, pipeline=12, virtual_pipeline=8, sequence=True, data=1)
HEAD = RewardHeadSize(attributes=5, bias=True)


def layout(tensor: int = 1, pipeline: int = 1, virtual: int = 1) -> ParallelConfig:
    return ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, data=1, sequence=tensor > 1)


def test_the_340b_has_the_published_number():
    assert total_parameters(N340, PAPER) == 341_029_195_776
    assert total_parameters(N340, PAPER) == count_parameters(N340).total  # 256,000 rows need no padding at TP 8


def test_stages_of_the_340b():
    stages = [stage_parameters(N340, PAPER, stage).total for stage in range(12)]
    assert stages == [4_044_423_168] + [3_454_599_168] * 10 + [4_044_460_032]


@pytest.mark.parametrize("tensor, pipeline, virtual", [(1, 1, 1), (2, 1, 1), (4, 2, 2), (8, 4, 1), (1, 2, 1)])
def test_the_whole_does_not_depend_on_the_layout(tensor, pipeline, virtual):
    model = tiny_model(vocab_size=256, num_attention_heads=8, num_query_groups=8)  # 256 rows need no padding
    assert total_parameters(model, layout(tensor, pipeline, virtual)) == count_parameters(model).total


def test_what_tensor_ranks_replicate_is_counted_once():
    model = tiny_model(vocab_size=256)
    one, two = stage_parameters(model, layout(1), 0), stage_parameters(model, layout(2), 0)
    assert two.norms == one.norms == (4 * model.num_layers + 2) * model.hidden_size
    assert 2 * two.split == one.split


def test_chunks_add_up_to_their_stage():
    chunks = stage_chunks(N340, PAPER, 11)
    assert len(chunks) == 8
    for field in dataclasses.fields(chunks[0]):
        total = sum(getattr(chunk, field.name) for chunk in chunks)
        assert total == getattr(stage_parameters(N340, PAPER, 11), field.name)
    assert [chunk.output > 0 for chunk in chunks] == [False] * 7 + [True]


def test_a_reward_model_has_its_head_in_place_of_the_output():
    last = chunk_parameters(N340, PAPER, 11, 7, HEAD)
    assert (last.output, last.head) == (0, 5 * 18432 + 5)
    assert total_parameters(N340, PAPER, HEAD) == 341_029_195_776 - 256000 * 18432 + 5 * 18432 + 5


# (model, tensor, pipeline, virtual, reward model)
BUILT = {
    "340b": ("340b", 8, 12, 8, False),
    "340b_of_a_reward_model": ("340b", 8, 12, 4, True),
    "340b_tp4": ("340b", 4, 4, 1, False),
    "tiny_whole": ("tiny", 1, 1, 1, False),
    "tiny_tp2_pp2_vp2": ("tiny", 2, 2, 2, False),
    "tiny_tp4_above_its_groups": ("tiny", 4, 1, 1, False),
    "tiny_reward_pp4": ("tiny", 2, 4, 1, True),
}


def build_all() -> dict[str, list[list[int]]]:
    """Parameters of the real model: [stage][chunk] of every case."""
    from nemo_align.config.objectives import RewardConfig
    from nemo_align.config.runtime import PrecisionConfig
    from nemo_align.planning.exact import count_parameters_exactly

    found = {}
    for name, (model, tensor, pipeline, virtual, reward) in BUILT.items():
        sizes = N340 if model == "340b" else tiny_model()
        head = RewardConfig() if reward else None
        found[name] = count_parameters_exactly(sizes, layout(tensor, pipeline, virtual), PrecisionConfig(), head)
    return found


@pytest.fixture(scope="module")
def built() -> dict[str, list[list[int]]]:
    return answer("build_all()", "from tests.unit.planning.test_parameters import build_all")


@pytest.mark.parametrize("case", BUILT)
def test_the_closed_form_equals_the_real_model_on_every_stage(built, case):
    model, tensor, pipeline, virtual, reward = BUILT[case]
    sizes = N340 if model == "340b" else tiny_model()
    head = HEAD if reward else None
    expected = [
        [chunk.total for chunk in stage_chunks(sizes, layout(tensor, pipeline, virtual), stage, head)]
        for stage in range(pipeline)
    ]
    assert built[case] == expected
