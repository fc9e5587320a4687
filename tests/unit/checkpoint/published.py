"""Small published checkpoints without a model, for tests of what reads manifests only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_align.checkpoint import manifest as manifests
from nemo_align.checkpoint import store

ENTRIES = {
    "verb": "sft",
    "final": False,
    "model": {"vocab_size": 5},
    "reward": None,
    "layout": {"tensor": 1},
    "optimizer_sharding": None,
    "dtype": "fp32",
    "tokenizer": None,
    "state": {},
    "megatron_core": "0",
    "torch": "0",
}


def publish(run_dir: Path, step: int, *, content: bytes = b"weights", **entries: Any) -> Path:
    """Publish a checkpoint of two files; `entries` of its manifest."""
    folder = store.begin(run_dir, step)
    (folder / "metadata.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "data").write_bytes(content)
    files = manifests.describe_files(folder, manifests.list_files(folder))
    manifests.write_manifest(folder, {**ENTRIES, "step": step, "files": files, **entries})
    return store.publish(folder, store.checkpoint_path(run_dir, step))
