"""The folder of everything that is computed once (`data.cache_dir`): what a failure to write there tells the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing_cache(cache_dir: Path) -> Iterator[None]:
    """Inside, an OSError (a full disk, no permission) becomes a ValueError with path, cause and remedy."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"data.cache_dir: {cache_dir} cannot be written ({error}); make room, or set data.cache_dir to a folder "
            "that can be written and that every rank sees"
        ) from error
