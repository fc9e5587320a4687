"""Transformer Engine's layers, built without a GPU where the package can be imported: each rank has the weights that a
checkpoint made on a CPU has, and every FP8 recipe is taken by Megatron-core and Transformer Engine.

Needs `pip install 'nemo_align[gpu]'`; skipped elsewhere.
"""

from __future__ import annotations

import importlib.util

import pytest

from nemo_align.config.choices import CHOICES
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from tests.fresh_process import answer
from tests.unit.model.test_dry_run import MODEL_340B

TENSOR, PIPELINE, VIRTUAL = 8, 12, 8
WORLD_SIZE = TENSOR * PIPELINE
RANKS = {"first": 0, "middle": TENSOR * 5 + 3, "last": WORLD_SIZE - 1}
RECIPES = list(CHOICES["precision.fp8"])

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="no Transformer Engine"),
]


def pretend_gpu() -> None:
    """An H100 that nothing may be computed on: enough for modules without memory to be built."""
    from types import SimpleNamespace

    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: torch.device("meta")
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="H100"
    )


def tensors_of(rank: int, recipe: str, *, gpu: bool) -> dict[str, list]:
    """Name in a distributed checkpoint -> [global shape, shape here, number format] of this rank's weights."""
    if gpu:
        pretend_gpu()
    else:
        from nemo_align.runtime import device

        device.install()
    import torch
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    import nemo_align.model.build as build
    from nemo_align.checkpoint import sharded_state
    from nemo_align.runtime.topology import pretended_rank

    real = build.build_transformer_config

    def without_memory(*arguments):
        config = real(*arguments)
        config.init_model_with_meta_device, config.perform_initialization = True, False
        return config

    build.build_transformer_config = without_memory
    parallel = ParallelConfig(tensor=TENSOR, pipeline=PIPELINE, virtual_pipeline=VIRTUAL, sequence=True)
    with pretended_rank(parallel, rank=rank, world_size=WORLD_SIZE) as topology:
        with torch.device("meta"):
            chunks = build.build_model(MODEL_340B, parallel, PrecisionConfig(fp8=recipe), topology)
        state = sharded_state.model_state(chunks, None)
    build.build_transformer_config = real
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
