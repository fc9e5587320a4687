"""Bring manifest, table and report of a pipeline up to date: `python -m nemo_align.pipeline <run_dir>`."""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_align.pipeline.summary import refresh, summarize

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m nemo_align.pipeline <run_dir>")
    folder = Path(sys.argv[1])
    try:
        summarize(folder, refresh(folder))
    except ValueError as problem:
        sys.exit(f"error: {problem}")
