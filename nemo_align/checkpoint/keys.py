"""Names of what a distributed checkpoint holds. No Megatron-core: conversion reads them too."""

from __future__ import annotations

OPTIMIZER_PREFIX = "optimizer."
RNG_KEY = "rng_state"
HEAD_PREFIX = "reward_head."
EXTRA_STATE = "_extra_state"  # Transformer Engine's FP8 history; ours only on a GPU with delayed scaling
_NOT_OF_THE_MODEL = (OPTIMIZER_PREFIX, f"{RNG_KEY}/", "common_state/", "chained_")


def is_model_key(key: str) -> bool:
    """Whether a key of the file belongs to the model."""
    return not key.startswith(_NOT_OF_THE_MODEL) and EXTRA_STATE not in key
