"""Folders that may not be there yet."""

from __future__ import annotations

from pathlib import Path


def existing_folder(path: Path | str) -> Path:
    """The folder, or the nearest one above it that is there: where its disk can be asked about without making it."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
