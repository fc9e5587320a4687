"""A target folder that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_align.checkpoint.manifest import flush_file


@contextmanager
def whole_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place, durably, when the block ends without an error.

    Raises:
        ValueError: `target` exists, is not empty and may not be overwritten.
    """
    target = Path(target)
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already: remove it or name another target")
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".tmp-{target.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = target.with_name(f".tmp-{target.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            flush_file(path)
        flush_file(temporary)
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
        flush_file(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
