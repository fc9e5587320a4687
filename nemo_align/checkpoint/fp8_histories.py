"""Scales and amax histories of FP8's delayed recipe in a checkpoint, as plain tensors.

Transformer Engine pickles them into each module's extra state, and reading a pickle may run code. Here the same values
are a dict of tensors under the same key, `decoder.layers.<n>.<module>._extra_state`. It is written once per module: the
histories are reduced over the tensor and data groups in every step, so one serves all ranks and any layout. The other
recipes scale by what they multiply and keep nothing.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.fp8_utils import get_fp8_recipe
from torch.distributed.checkpoint.metadata import Metadata

from nemo_align.checkpoint.keys import EXTRA_STATE

logger = logging.getLogger("nemo_align")

_DIRECTIONS = {"forward": "scaling_fwd", "backward": "scaling_bwd"}  # ours and Transformer Engine's
_VALUES = ("scale", "amax_history")  # [tensors], [history, tensors], both fp32
_TENSORS = {"forward": 3, "backward": 2}  # input, weight, output; their gradients but the weight's


def for_saving(module: torch.nn.Module, sharded: dict[str, Any]) -> dict[str, Any]:
    """A model chunk's sharded state with plain histories as extra states, and none where a module has no history."""
    result = {name: value for name, value in sharded.items() if EXTRA_STATE not in name}
    for name, value in _extra_states(sharded):
        if histories := _histories(_owner(module, name)):
            result[name] = replace(value, data=histories)
    return result


def for_resuming(module: torch.nn.Module, sharded: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    """A chunk's sharded state to read a checkpoint into: of the extra states those that it holds and the run needs."""
    wanted = set(metadata.state_dict_metadata) if _is_delayed(module) else ()
    unread = {name for name, value in _extra_states(sharded) if value.unique_key not in wanted}
    return {name: value for name, value in sharded.items() if name not in unread}


def restore(module: torch.nn.Module, loaded: dict[str, Any]) -> int:
    """Take the histories out of a chunk's loaded state and give them to its modules; returns how many modules.

    Raises:
        ValueError: a history that is none, with the module's name.
    """
    names = [name for name in loaded if EXTRA_STATE in name]
    for name in names:
        histories, owner, recipe = loaded.pop(name), _owner(module, name), get_fp8_recipe(module.config)
        _check(name, histories, recipe.amax_history_len)
        owner.fp8_meta["num_gemms"], owner.fp8_meta["recipe"] = 1, recipe
        owner.init_fp8_meta_tensors(recipe)  # the first forward pass, which else does it, keeps what is there
        for direction, key in _DIRECTIONS.items():
            for value in _VALUES:
                getattr(owner.fp8_meta[key], value).copy_(histories[direction][value])
    return len(names)


def report(module: torch.nn.Module, restored: int, metadata: Metadata) -> None:
    """Say in the log where histories are left unread or start anew."""
    in_file = any(EXTRA_STATE in key for key in metadata.state_dict_metadata)
    if restored:
        logger.info("FP8 scaling histories of %d modules of this rank go on", restored)
    elif in_file:
        logger.info("FP8 scaling histories of the checkpoint stay unread: this run does not scale by history")
    elif _is_delayed(module):
        logger.info("no FP8 scaling histories in the checkpoint, whose run did not scale by history: they start anew")


def _is_delayed(module: torch.nn.Module) -> bool:
    return bool(module.config.fp8) and module.config.fp8_recipe == "delayed"


def _extra_states(sharded: dict[str, Any]) -> list[tuple[str, ShardedObject]]:
    return [(name, value) for name, value in sharded.items() if EXTRA_STATE in name]


def _owner(module: torch.nn.Module, name: str) -> torch.nn.Module:
    path, _, last = name.rpartition(".")
    assert last == EXTRA_STATE, name
    return module.get_submodule(path)


def _histories(owner: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]] | None:
    meta = getattr(owner, "fp8_meta", {})
    if not all(hasattr(meta.get(key), "amax_history") for key in _DIRECTIONS.values()):
        return None
    return {
        direction: {value: getattr(meta[key], value).detach().cpu() for value in _VALUES}
        for direction, key in _DIRECTIONS.items()
    }


def _check(name: str, histories: object, length: int) -> None:
    for direction, tensors in _TENSORS.items():
        for value, shape in zip(_VALUES, ((tensors,), (length, tensors)), strict=True):
            try:
                found = histories[direction][value]
                good = found.dtype == torch.float32 and tuple(found.shape) == shape
            except (TypeError, KeyError, AttributeError):
                good = False
            if not good or not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
                raise ValueError(f"{name} of the checkpoint holds no FP8 {direction} {value} of shape {list(shape)}")
