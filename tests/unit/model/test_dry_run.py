"""Ranks of the 340B on 768 nodes, built without memory or other ranks: a fake process group and the meta device."""

from __future__ import annotations

import time

import pytest

from nemo_align.config.model import ModelConfig
from nemo_align.config.objectives import RewardConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from tests.fresh_process import answer

TENSOR, PIPELINE, VIRTUAL, DATA = 8, 12, 8, 64
WORLD_SIZE = TENSOR * PIPELINE * DATA
MODEL_340B = ModelConfig(
    name="nemotron4_340b",
    num_layers=96,
    hidden_size=18432,
    ffn_hidden_size=73728,
    num_attention_heads=96,
    num_query_groups=8,
    vocab_size=256000,
)
STAGE = TENSOR * DATA  # ranks of one pipeline stage
CASES = {  # rank, whether it is a reward model
    "first": (0, False),
    "middle": (STAGE, False),
    "last": (STAGE * (PIPELINE - 1), False),
    "last_of_reward_model": (STAGE * (PIPELINE - 1), True),
}


def dry_run(rank: int, reward: bool) -> dict[str, object]:
    """Parameters of each model chunk of this rank, and the CPU seconds to build them."""
    import torch

    from nemo_align.model.build import build_model
    from nemo_align.runtime.topology import pretended_rank

    start = time.process_time()
    parallel = ParallelConfig(tensor=TENSOR, pipeline=PIPELINE, virtual_pipeline=VIRTUAL, sequence=True)
    head = RewardConfig() if reward else None
    with pretended_rank(parallel, rank=rank, world_size=WORLD_SIZE) as topology, torch.device("meta"):
        chunks = build_model(MODEL_340B, parallel, PrecisionConfig(), topology, reward_head=head)
    assert all(parameter.is_meta for chunk in chunks for parameter in chunk.parameters())
    seconds = time.process_time() - start
    sizes = [sum(parameter.numel() for parameter in chunk.parameters()) for chunk in chunks]
    return {"chunks": sizes, "seconds": seconds}


@pytest.fixture(scope="module")
def ranks() -> dict[str, dict]:
    return answer(
        "{name: dry_run(*case) for name, case in CASES.items()}",
        "from nemo_align.runtime import device; device.install()\n"
        "from tests.unit.model.test_dry_run import CASES, dry_run",
    )


@pytest.mark.parametrize(
    ("case", "parameters"),
    [
        ("first", 4_044_423_168),
        ("middle", 3_454_599_168),
        ("last", 4_044_460_032),
        # The final norm and five attributes in place of a part of the output layer.
        ("last_of_reward_model", 3_454_599_168 + 2 * 18432 + 5 * 18432 + 5),
    ],
)
def test_parameters_of_one_of_6144_ranks(ranks: dict[str, dict], case: str, parameters: int) -> None:
    assert sum(ranks[case]["chunks"]) == parameters


def test_a_chunk_is_one_layer(ranks: dict[str, dict]) -> None:
    matrices = 18432 * (96 + 2 * 8) * 192 + 18432**2 + 2 * 18432 * 73728
    assert ranks["middle"]["chunks"] == [matrices // TENSOR + 4 * 18432] * VIRTUAL


def test_a_dry_run_takes_no_time(ranks: dict[str, dict]) -> None:
    assert min(rank["seconds"] for rank in ranks.values()) < 3
