"""What a run would do, found out without a GPU, other ranks or the data: `dry_run=true`. Starts and writes nothing."""

from __future__ import annotations

import os


def without_gpu() -> None:
    """Hide GPUs, before torch is imported: the answer is the same on a laptop, a login node and a GPU machine."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
