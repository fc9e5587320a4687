"""Transformer Engine's layers, built without a GPU where the package can be imported: each rank has the weights that a
checkpoint made on a CPU has, and every FP8 recipe is taken by Megatron-core and Transformer Engine.

Needs `pip install 'nemo_align[gpu]'`; skipped elsewhere.
"""

from __future__ import annotations

import pytest

from nemo_align.config.choices import CHOICES
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from tests import transformer_engine
from tests.fresh_process import answer
from tests.unit.model.test_dry_run import MODEL_340B

TENSOR, PIPELINE, VIRTUAL = 8, 12, 8
WORLD_SIZE = TENSOR * PIPELINE
RANKS = {"first": 0, "middle": TENSOR * 5 + 3, "last": WORLD_SIZE - 1}
RECIPES = list(CHOICES["precision.fp8"])

pytestmark = transformer_engine.needed


def tensors_of(rank: int, recipe: str, *, gpu: bool) -> dict[str, list]:
    """Name in a distributed checkpoint -> [global shape, shape here, number format] of this rank's weights."""
    from nemo_align.runtime import device

    if gpu:
        transformer_engine.pretend_gpu()
    else:
        device.install()
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from nemo_align.checkpoint import sharded_state
    from nemo_align.model.build import build_model
    from nemo_align.runtime.topology import pretended_rank

    parallel = ParallelConfig(tensor=TENSOR, pipeline=PIPELINE, virtual_pipeline=VIRTUAL, sequence=True)
    with pretended_rank(parallel, rank=rank, world_size=WORLD_SIZE) as topology:
        without_memory = transformer_engine.config_fields(
            init_model_with_meta_device=True, perform_initialization=False
        )
        with torch.device("meta"), without_memory:
            chunks = build_model(MODEL_340B, parallel, PrecisionConfig(fp8=recipe), topology)
        state = sharded_state.model_state(chunks, None)
    return {
        value.key: [list(value.global_shape), list(value.local_shape), str(value.dtype)]
        for value in nested_values(state)
        if isinstance(value, ShardedTensor)
    }


def ask(rank: int, recipes: list[str], *, gpu: bool) -> dict[str, dict]:
    """The tensors by recipe, in a process of its own: it pretends, and its process group is a fake."""
    return answer(
        f"{{recipe: tensors_of({rank}, recipe, gpu={gpu}) for recipe in {recipes!r}}}",
        "from tests.unit.model.test_transformer_engine_layers import tensors_of",
    )


@pytest.mark.parametrize("place", RANKS)
def test_weights_are_those_of_the_cpu_s_layers(place: str) -> None:
    expected = ask(RANKS[place], ["none"], gpu=False)["none"]
    found = ask(RANKS[place], RECIPES, gpu=True)
    assert set(found) == set(RECIPES)
    assert len(expected) >= VIRTUAL * 8
    for recipe in RECIPES:
        assert found[recipe] == expected, recipe
