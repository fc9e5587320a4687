"""Transformer Engine's layers, built without a GPU where the package can be imported: each rank has the weights that a
checkpoint made on a CPU has, and every FP8 recipe is taken by Megatron-core and Transformer Engine.

Needs `pip install 'nemo_align[gpu]'`; skipped elsewhere.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_align.config.choices import CHOICES
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
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
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import nemo_align.model.build as build
    from nemo_align.checkpoint import sharded_state
    from nemo_align.runtime.topology import Topology

    if not distributed.is_initialized():
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD_SIZE)
        parallel_state.initialize_model_parallel(TENSOR, PIPELINE, VIRTUAL, create_gloo_process_groups=False)
    topology = Topology(
        world_size=WORLD_SIZE,
        rank=rank,
        tensor=TENSOR,
        pipeline=PIPELINE,
        virtual_pipeline=VIRTUAL,
        data=1,
        sequence=True,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=0,
        device=torch.device("cpu"),
    )
    real = build.build_transformer_config

    def without_memory(*arguments):
        config = real(*arguments)
        config.init_model_with_meta_device, config.perform_initialization = True, False
        return config

    build.build_transformer_config = without_memory
    parallel = ParallelConfig(tensor=TENSOR, pipeline=PIPELINE, virtual_pipeline=VIRTUAL, sequence=True)
    with torch.device("meta"):
        chunks = build.build_model(MODEL_340B, parallel, PrecisionConfig(fp8=recipe), topology)
    build.build_transformer_config = real
    state = sharded_state.model_state(chunks, None)
    return {
        value.key: [list(value.global_shape), list(value.local_shape), str(value.dtype)]
        for value in nested_values(state)
        if isinstance(value, ShardedTensor)
    }


def ask(rank: int, recipes: list[str], *, gpu: bool) -> dict[str, dict]:
    """The tensors by recipe, in a process of its own: it pretends, and its process group is a fake."""
    code = (
        "import json\nfrom tests.unit.model.test_transformer_engine_layers import tensors_of\n"
        f"print(json.dumps({{recipe: tensors_of({rank}, recipe, gpu={gpu}) for recipe in {recipes!r}}}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("place", RANKS)
def test_weights_are_those_of_the_cpu_s_layers(place: str) -> None:
    expected = ask(RANKS[place], ["none"], gpu=False)["none"]
    found = ask(RANKS[place], RECIPES, gpu=True)
    assert set(found) == set(RECIPES)
    assert len(expected) >= VIRTUAL * 8
    for recipe in RECIPES:
        assert found[recipe] == expected, recipe
