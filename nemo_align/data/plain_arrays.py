"""Numpy files from disk, never as pickles.

`numpy.load(..., allow_pickle=True)` unpickles an array of objects, and also any file that is not numpy's at all. Caches
may lie in a folder that others can write to, so nothing that we or Megatron-core read from them may be a pickle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np


def load_array(path: Path, *, remedy: str) -> np.ndarray:
    """A `.npy` file, memory-mapped read-only. Raises ValueError with the file's name for anything but plain numbers."""
    try:
        # Not numpy.load, which takes a zip for an archive of arrays.
        return np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} holds no plain numbers ({_first_line(error)}); {remedy}") from None


@contextmanager
def without_pickles() -> Iterator[None]:
    """Inside, `numpy.load` refuses pickles whatever its caller allows.

    Megatron-core reads its sample indices with `allow_pickle=True` and has no option for it. What it writes there are
    plain integers. Main thread only.
    """
    load = np.load

    def plain(*args: Any, **kwargs: Any) -> Any:
        if len(args) > 2:  # file, mmap_mode, allow_pickle, ...
            args = (*args[:2], False, *args[3:])
        else:
            kwargs["allow_pickle"] = False
        try:
            return load(*args, **kwargs)
        except ValueError as error:
            name = args[0] if args else kwargs.get("file")
            raise ValueError(
                f"{name} holds no plain numbers ({_first_line(error)}); delete it, it is built again"
            ) from None

    with patch.object(np, "load", plain):
        yield


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
