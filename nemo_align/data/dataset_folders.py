"""What a folder written by `datasets.save_to_disk` may not make the `datasets` library open."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_OPENING = ("Image", "Audio", "Video", "Pdf", "Nifti")  # features that open the path or address in a row


def check_state(folder: Path) -> None:
    """Raise ValueError if state.json is damaged or names files outside of its folder."""
    state = folder / "state.json"
    try:
        names = [Path(entry["filename"]) for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{state}: damaged ({type(error).__name__}: {error}); write it again with save_to_disk"
        ) from None
    if outside := [str(name) for name in names if name.is_absolute() or ".." in name.parts]:
        raise ValueError(f"{state}: {outside[0]} lies outside of the folder; write it again with save_to_disk")


def check_columns(folder: Path, features: Mapping[str, Any]) -> None:
    """Raise ValueError for a column whose values `datasets` would open as files or addresses while rows are read."""
    for name, feature in features.items():
        if found := [kind for kind in _OPENING if f"{kind}(" in repr(feature)]:
            raise ValueError(
                f"data path {folder}: column {name} is of type {found[0]}; remove it, only text is trained on"
            )
