"""Token lengths of a stage's rows: from a file, or from the cache that a run of the stage has written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from nemo_align.config.data import RowsDataConfig
from nemo_align.data.plain_arrays import load_array

_REMEDY = (
    "name a .npy of whole numbers [rows] or [rows, 2], a text file with the lengths of a row in each line, or a cache "
    "folder"
)


def read_lengths(path: Path, segments: int) -> np.ndarray:
    """int64 [N, segments]: tokens of each dialogue (1), or of chosen and rejected with their prompts (2).

    Raises:
        ValueError: nothing there, not numbers, numbers below 1, or another number of segments.
    """
    if not path.exists():
        raise ValueError(f"lengths={path} does not exist: {_REMEDY}")
    if path.is_dir():
        lengths = _of_cache(path)
    elif path.suffix == ".npy":
        lengths = _of_array(path, path)
    else:
        lengths = _of_text(path)
    if lengths.ndim == 1:
        lengths = lengths[:, None]
    if lengths.ndim != 2 or not np.issubdtype(lengths.dtype, np.integer) or len(lengths) == 0:
        raise ValueError(f"lengths={path} holds {lengths.dtype} {list(lengths.shape)}: {_REMEDY}")
    if lengths.shape[1] != segments:
        what = "one length, of the dialogue" if segments == 1 else "two lengths, of chosen and rejected"
        raise ValueError(f"lengths={path} has {lengths.shape[1]} numbers a row, but a row of this stage has {what}")
    if int(lengths.min()) < 1:
        rows = int((lengths < 1).any(axis=1).sum())
        raise ValueError(
            f"lengths={path} has {rows:,} of {len(lengths):,} rows with less than 1 token (the least is "
            f"{int(lengths.min())}): leave them out, no row of a stage is empty"
        )
    return lengths.astype(np.int64)


def fitted(lengths: np.ndarray, data: RowsDataConfig) -> tuple[np.ndarray, str | None]:
    """What `data.overlong` leaves of rows longer than `data.sequence_length`, and a note if it changes any.

    Raises:
        ValueError: data.overlong=error and such rows, or no row is left.
    """
    most = data.sequence_length
    assert most is not None
    keep = (lengths <= most).all(axis=1)
    if keep.all():
        return lengths, None
    found = (
        f"{int((~keep).sum()):,} of {len(keep):,} rows are longer than data.sequence_length={most} (the longest has "
        f"{int(lengths.max()):,} tokens)"
    )
    if data.overlong == "truncate":
        # Lengths do not tell turns: what is left of such a row may be shorter, or nothing.
        note = (
            f"{found}: taken as cut to it, training takes whole turns away, the oldest first (data.overlong=truncate)"
        )
        return np.minimum(lengths, most), note
    if data.overlong == "error":
        raise ValueError(f"{found} and data.overlong=error: raise the length, or set data.overlong=drop")
    if not keep.any():
        raise ValueError(f"every row is longer than data.sequence_length={most}: raise it, or give shorter rows")
    return lengths[keep], f"{found}: left out, as in training (data.overlong={data.overlong})"


def _of_cache(folder: Path) -> np.ndarray:
    """A cache of tokenized rows (data/tokenized_rows.py)."""
    meta = folder / "meta.json"
    if not meta.is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/meta.json"))
        hint = f"; it holds the caches {', '.join(inside)}" if inside else ""
        raise ValueError(f"lengths={folder} is no cache of tokenized rows (meta.json is missing){hint}")
    segments = json.loads(meta.read_text(encoding="utf-8"))["segments"]
    return np.diff(_of_array(folder, folder / "offsets.npy")).reshape(-1, segments)


def _of_array(path: Path, file: Path) -> np.ndarray:
    try:
        return load_array(file, remedy=_REMEDY)
    except ValueError as error:
        raise ValueError(f"lengths={path}: {error}") from None


def _of_text(path: Path) -> np.ndarray:
    try:
        lines = path.read_text(encoding="utf-8").replace(",", " ").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"lengths={path} cannot be read as text ({error}): {_REMEDY}") from None
    rows = [line.split() for line in lines if line.strip()]
    if not rows or len({len(row) for row in rows}) != 1:
        raise ValueError(f"lengths={path} is empty or has lines of different kinds: {_REMEDY}")
    try:
        return np.array([[int(word) for word in row] for row in rows], dtype=np.int64)
    except ValueError:
        raise ValueError(f"lengths={path} holds something else than whole numbers: {_REMEDY}") from None
