"""Which parallel layout may resume from a save. No torch: the starting process asks before it writes anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nemo_align.checkpoint import store
from nemo_align.checkpoint.manifest import read_manifest
from nemo_align.config.runtime import ParallelConfig

_SAME_MODEL_SPLIT = ("tensor", "pipeline", "virtual_pipeline")  # what dp_reshardable does not let change


def layout_problem(path: Path, manifest: dict, now: Mapping, *, distributed_optimizer: bool) -> str | None:
    """Why training cannot go on from a save under another layout, with the remedy; None if it can.

    Args:
        now: the layout to resume under; of it tensor, pipeline and virtual_pipeline matter.
    """
    saved = manifest["optimizer_sharding"]
    if saved is None:
        return f"{path} holds weights only (converted, or saved without optimizer): use it as checkpoint.init_from"
    if (saved == "replicated") == distributed_optimizer:
        return (
            f"{path} was saved {'without' if saved == 'replicated' else 'with'} the distributed optimizer: set "
            f"parallel.distributed_optimizer={str(not distributed_optimizer).lower()}, or take the weights alone with "
            "checkpoint.init_from"
        )
    before = manifest["layout"]
    if saved == "dp_reshardable" and any(before[key] != now[key] for key in _SAME_MODEL_SPLIT):
        names = " ".join(f"parallel.{key}={before[key]}" for key in _SAME_MODEL_SPLIT)
        wanted = " ".join(f"parallel.{key}={now[key]}" for key in _SAME_MODEL_SPLIT)
        return (
            f"{path} is a periodic save under {names}: its optimizer state loads only under these (any parallel.data), "
            f"not under {wanted}. Resume with {names} until the end of the stage, whose final checkpoint loads under "
            "any layout, or start a new run_dir from the weights with checkpoint.init_from"
        )
    return None


def refuse_layout(run_dir: Path, parallel: ParallelConfig) -> None:
    """Raise ValueError if the newest checkpoint of a run cannot be resumed under this layout.

    Only sizes are compared here. Should the checksums then make the workers fall back to an older checkpoint of yet
    another layout, they refuse it in the same words.
    """
    newest = next((path for path in store.candidates(run_dir) if not store.find_problems(path, checksums=False)), None)
    if newest is None:
        return
    now = {key: getattr(parallel, key) for key in _SAME_MODEL_SPLIT}
    distributed = parallel.distributed_optimizer
    if problem := layout_problem(newest, read_manifest(newest), now, distributed_optimizer=distributed):
        raise ValueError(problem)
