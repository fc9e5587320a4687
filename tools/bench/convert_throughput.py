#!/usr/bin/env python
"""Conversion against `cp --reflink=never` and `sync` of the same bytes on the same disk, in one run.

    .venv/bin/python tools/bench/convert_throughput.py --folder /scratch/bench --sizes 2 4 8

For each size in GB: a Hugging Face folder of random bf16 weights is written; then copying it, converting it to Megatron
and converting that back are timed, each with what forces it to disk, the page cache emptied before each where this
process may do so. The peak of anonymous memory is read from /proc while the command runs. Needs about five times the
largest size on the disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nemo_align.checkpoint.huggingface.model_config import hf_config
from nemo_align.checkpoint.huggingface.weight_map import weight_map
from nemo_align.checkpoint.streaming import safetensors
from nemo_align.checkpoint.streaming.tensors import as_bytes
from nemo_align.config.model import ModelConfig

_BLOCK_VALUES = 1 << 24


def model_of(gigabytes: float) -> ModelConfig:
    """A Nemotron of about that size in bf16: the width of the 8B, as many layers as it takes."""
    sizes = {"hidden_size": 4096, "ffn_hidden_size": 16384, "num_attention_heads": 32, "num_query_groups": 8}
    embeddings, layer = 2 * 64_000 * 4096 * 2, (4096 * 4096 * 2 + 4096 * 2048 + 2 * 4096 * 16384) * 2
    layers = max(1, round((gigabytes * 1e9 - embeddings) / layer))
    return ModelConfig(name=f"bench_{gigabytes:g}gb", num_layers=layers, head_dim=128, vocab_size=64_000, **sizes)


def write_source(folder: Path, model: ModelConfig) -> int:
    """A Hugging Face folder of random weights; returns its bytes."""
    folder.mkdir(parents=True)
    block = torch.randn(_BLOCK_VALUES, generator=torch.Generator().manual_seed(1)).bfloat16()
    view = as_bytes(block)
    shapes = {
        name: shape
        for weight in weight_map(model, has_output_layer=True)
        for name, shape in zip(weight.hf, weight.hf_shapes, strict=True)
    }
    shards = safetensors.lay_out({name: _Shape(shape) for name, shape in shapes.items()})
    for shard in shards:
        with open(folder / shard.file, "wb") as stream:
            stream.write(shard.header)
            for name in shard.tensors:
                left = 2 * math.prod(shapes[name])
                while left:
                    left -= stream.write(view[: min(left, len(view))])
    if (index := safetensors.index_of(shards)) is not None:
        (folder / safetensors.INDEX).write_bytes(index)
    config = hf_config(model, dtype="bf16", bos_id=1, eos_id=2, pad_id=0, reward=None)
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.iterdir())


class _Shape:
    dtype = torch.bfloat16

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds until the command has ended and everything is on disk, and its peak of anonymous memory in bytes."""
    empty_cache()
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    os.sync()
    return time.perf_counter() - began, peak


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def empty_cache() -> bool:
    """Let the next command read from the disk; False where only an administrator may."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure; made and removed")
    parser.add_argument("--sizes", type=float, nargs="+", default=[2, 4, 8], help="GB")
    parser.add_argument("--max-memory", default="1GB")
    parser.add_argument("--workers", default="null")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists")
    options.folder.mkdir(parents=True)
    print(f"page cache emptied before each command: {'yes' if empty_cache() else 'no'}")
    print(f"{'GB':>6}  {'what':<16}{'seconds':>9}{'MB/s':>8}{'of cp':>8}{'anonymous MB':>14}")
    try:
        for size in options.sizes:
            measure(options, size)
    finally:
        shutil.rmtree(options.folder)


def measure(options: argparse.Namespace, size: float) -> None:
    """One size: copy, there, back."""
    source, there, back, copy = (options.folder / name for name in ("source", "there", "back", "copy"))
    num_bytes = write_source(source, model_of(size))
    nemo_align = str(Path(sys.executable).with_name("nemo-align"))
    common = [f"max_memory={options.max_memory}", f"workers={options.workers}", f"run_dir={options.folder}/log"]
    commands = {
        "cp and sync": ["cp", "-r", "--reflink=never", str(source), str(copy)],
        "hf to megatron": [nemo_align, "convert", "from=hf", "to=megatron", f"source={source}", f"target={there}"],
        "megatron to hf": [nemo_align, "convert", "from=megatron", "to=hf", f"source={there}", f"target={back}"],
    }
    reference = None
    for what, command in commands.items():
        seconds, peak = timed(command if what == "cp and sync" else [*command, *common])
        rate = num_bytes / seconds
        reference = reference or rate
        print(
            f"{num_bytes / 1e9:>6.2f}  {what:<16}{seconds:>9.1f}{rate / 1e6:>8.0f}{rate / reference:>8.2f}"
            f"{peak / 1e6:>14.0f}",
            flush=True,
        )
        if what == "cp and sync":
            shutil.rmtree(copy)
    for folder in (source, there, back):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
