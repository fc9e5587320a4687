"""Transformer Engine's layers, built without a GPU where the package can be imported: each rank has the weights that a
checkpoint made on a CPU has, and every FP8 recipe is taken by Megatron-core and Transformer Engine.

Needs `pip install 'nemo_align[gpu]'`; skipped elsewhere.
"""

from __future__ import annotations

from typing import Any

import pytest

from nemo_align.config.choices import CHOICES
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.config.stages import PreferenceStageConfig
from nemo_align.model.counts import bf16_layers
from tests import transformer_engine
from tests.fresh_process import answer
from tests.unit.model.configs import tiny_model
from tests.unit.model.test_dry_run import MODEL_340B

TENSOR, PIPELINE, VIRTUAL = 8, 12, 8
WORLD_SIZE = TENSOR * PIPELINE
RANKS = {"first": 0, "middle": TENSOR * 5 + 3, "last": WORLD_SIZE - 1}
RECIPES = list(CHOICES["precision.fp8"])

pytestmark = transformer_engine.needed


def tensors_of(rank: int, recipe: str, *, gpu: bool, overlap: bool = False) -> dict[str, list]:
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

    parallel = ParallelConfig(
        tensor=TENSOR, pipeline=PIPELINE, virtual_pipeline=VIRTUAL, sequence=True, overlap_tensor=overlap
    )
    if overlap:  # the layers ask whether the buffers are there, which needs GPUs
        from transformer_engine.pytorch.module import base

        base._ub_initialized = True
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


def ask_here(expression: str) -> Any:
    """The value of an expression of this file's names, in a process of its own."""
    return answer(expression, "from tests.unit.model.test_transformer_engine_layers import *")


def ask(rank: int, recipes: list[str], *, gpu: bool) -> dict[str, dict]:
    """The tensors by recipe, in a process of its own: it pretends, and its process group is a fake."""
    return ask_here(f"{{recipe: tensors_of({rank}, recipe, gpu={gpu}) for recipe in {recipes!r}}}")


@pytest.mark.parametrize("place", RANKS)
def test_weights_are_those_of_the_cpu_s_layers(place: str) -> None:
    expected = ask(RANKS[place], ["none"], gpu=False)["none"]
    found = ask(RANKS[place], RECIPES, gpu=True)
    assert set(found) == set(RECIPES)
    assert len(expected) >= VIRTUAL * 8
    for recipe in RECIPES:
        assert found[recipe] == expected, recipe


def test_userbuffers_change_no_weight() -> None:
    rank = RANKS["first"]
    found = ask_here(f"[tensors_of({rank}, 'none', gpu=True, overlap=overlap) for overlap in (False, True)]")
    assert found[0] == found[1]


def fp8_layers(recipe: str, first: int | None, last: int | None) -> list[bool]:
    """Whether Megatron-core runs each layer of the 340B inside Transformer Engine's FP8 context, by its own rule."""
    transformer_engine.pretend_gpu()
    from contextlib import nullcontext
    from unittest.mock import patch

    from megatron.core import fp8_utils

    from nemo_align.model.transformer_config import build_transformer_config

    precision = PrecisionConfig(fp8=recipe, bf16_first_layers=first, bf16_last_layers=last)
    config = build_transformer_config(MODEL_340B, ParallelConfig(pipeline=PIPELINE), precision)
    entered: list[bool] = []
    with patch("transformer_engine.pytorch.fp8_autocast", lambda **_: entered.append(True) or nullcontext()):
        layers = []
        for layer in range(MODEL_340B.num_layers):
            entered.clear()
            fp8_utils.get_fp8_context(config, layer)
            layers.append(bool(entered))
    return layers


@pytest.mark.parametrize(
    ("recipe", "first", "last"),
    [
        ("delayed", None, None),
        ("tensorwise", None, None),
        ("tensorwise", 0, 0),
        ("tensorwise", 8, 2),
        ("blockwise", None, None),
        ("blockwise", 1, 0),
    ],
)
def test_layers_in_fp8_are_those_that_the_plan_counts(recipe: str, first: int | None, last: int | None) -> None:
    found = ask_here(f"fp8_layers({recipe!r}, {first}, {last})")
    precision = PrecisionConfig(fp8=recipe, bf16_first_layers=first, bf16_last_layers=last)
    begin, end = bf16_layers(precision)
    size = MODEL_340B.num_layers
    assert found == [begin <= layer < size - end for layer in range(size)]


def userbuffers(recipe: str) -> dict:
    """What Transformer Engine is asked for, checked against the signature of its function."""
    transformer_engine.pretend_gpu()
    import inspect
    from unittest.mock import patch

    from transformer_engine.pytorch.module import base

    from nemo_align.training import userbuffers

    signature, asked = inspect.signature(base.initialize_ub), {}
    with patch.object(base, "initialize_ub", lambda **options: asked.update(signature.bind(**options).arguments)):
        userbuffers.start(stage(PreferenceStageConfig, recipe, micro_batch_tokens=10_000))
    modes = [mode.name for mode in asked["quantization_modes"]]
    return {"shape": asked["shape"], "size": asked["tp_size"], "modes": modes}


def stage(kind: type, recipe: str = "none", **train: Any) -> Any:
    """A stage of the 340B whose tensor-parallel communication overlaps."""
    parallel = ParallelConfig(tensor=TENSOR, sequence=True, overlap_tensor=True)
    config = kind(model=MODEL_340B, parallel=parallel, precision=PrecisionConfig(fp8=recipe))
    config.data.sequence_length = 4096
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


@pytest.mark.parametrize(
    ("recipe", "tokens", "modes"),
    [("none", 10_000, ["NONE"]), ("delayed", 10_112, ["FP8", "NONE"]), ("tensorwise", 10_112, ["FP8", "NONE"])],
)
def test_userbuffers_are_made_for_what_travels(recipe: str, tokens: int, modes: list[str]) -> None:
    found = ask_here(f"userbuffers({recipe!r})")
    assert found == {"shape": [tokens, MODEL_340B.hidden_size], "size": TENSOR, "modes": modes}


def kernels() -> list[dict]:
    """The variables that Transformer Engine reads, after a model was built with each choice, and their refusal."""
    import os

    names = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
    found = []
    for attention in CHOICES["precision.attention"]:
        tiny_on_meta(attention)
        found.append([os.environ[name] for name in names])
    return found


def tiny_on_meta(attention: str) -> None:
    transformer_engine.pretend_gpu()
    import torch

    from nemo_align.model.build import build_model
    from nemo_align.runtime.topology import pretended_rank

    parallel, precision = ParallelConfig(pipeline=2, virtual_pipeline=2), PrecisionConfig(attention=attention)
    with pretended_rank(parallel, rank=0, world_size=2) as topology:
        without_memory = transformer_engine.config_fields(
            init_model_with_meta_device=True, perform_initialization=False
        )
        with torch.device("meta"), without_memory:
            build_model(tiny_model(), parallel, precision, topology)


def test_unfused_attention_is_used_only_when_asked_for() -> None:
    found = ask_here("kernels()")
    assert CHOICES["precision.attention"] == ("auto", "flash", "fused", "unfused")
    assert found == [["1", "1", "0"], ["1", "0", "0"], ["0", "1", "0"], ["0", "0", "1"]]


def test_a_kernel_chosen_by_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    assert "NVTE_FUSED_ATTN=0 in the environment: unset it and say precision.attention=" in ask_here("refusal()")


def refusal() -> str:
    try:
        tiny_on_meta("auto")
    except ValueError as error:
        return str(error)
    return ""
