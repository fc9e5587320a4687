"""Where checkpoint and model may differ at their two ends: the head of a reward model, the rows of the vocabulary."""

from __future__ import annotations

import logging

from nemo_align.checkpoint.keys import HEAD_PREFIX
from nemo_align.checkpoint.store import CheckpointReference

logger = logging.getLogger("nemo_align")


def settle_head(
    reference: CheckpointReference, requested: dict[str, tuple | None], stored: dict, *, load_head: bool
) -> set[str]:
    """Keys that stay unread because policy and reward model end differently; refuses what cannot be right."""
    wants_head = any(key.startswith(HEAD_PREFIX) for key in requested)
    has_head = any(key.startswith(HEAD_PREFIX) for key in stored)
    if not wants_head:
        if has_head:
            raise ValueError(f"{reference.path} is a reward model: it has no output layer to start a policy from")
        assert not load_head
        return set()
    if load_head and not has_head:
        raise ValueError(f"reward.load_head=true, but {reference.path} has no reward head: set reward.load_head=false")
    if load_head:
        return set()
    logger.info("the reward head stays as initialised%s", "; that of the checkpoint is not read" if has_head else "")
    heads = {key for key in (*requested, *stored) if key.startswith(HEAD_PREFIX)}
    return heads | {"output_layer.weight"}


def vocabulary_problems(requested: dict[str, tuple | None], manifest: dict) -> list[str]:
    """Padding may differ, real rows must not be cut off: allow_shape_mismatch alone would drop them in silence."""
    vocabulary = manifest["model"]["vocab_size"]
    return [
        f"{key} has {entry[0][0]} rows, fewer than the checkpoint's vocabulary of {vocabulary}"
        for key, entry in requested.items()
        if entry is not None and entry[1] and entry[0][0] < vocabulary
    ]
