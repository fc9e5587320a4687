"""`nemo-align inspect`: what a checkpoint is, whether it is whole, and what can be done with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from nemo_align.checkpoint import checksums, store
from nemo_align.checkpoint.conversion.convert import detect, open_source
from nemo_align.checkpoint.conversion.model import DTYPE_NAMES, Model, tokenizer_folder, tokens_beyond
from nemo_align.checkpoint.streaming.tensors import num_bytes
from nemo_align.config.conversion import InspectConfig
from nemo_align.data.tokenizer import load_tokenizer
from nemo_align.model.counts import head_dim

_NAMES = {"hf": "Hugging Face (safetensors)", "megatron": "Megatron-core (torch_dist)", "nemo": ".nemo"}


def inspect(config: InspectConfig) -> None:
    """Print a description of the checkpoint in `path`.

    Raises:
        ValueError: nothing there, a format or architecture that cannot be read (named), damage.
    """
    path = Path(config.path)
    kind = detect(path)
    model = open_source(path, kind, unused_attributes="keep")
    lines = dict(_describe(model))
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")
    for note in model.notes + tokens_beyond(model):
        print(f"note: {note}")
    if config.tensors:
        print()
        rows = [(key, "x".join(map(str, tensor.shape)), tensor) for key, tensor in model.tensors.items()]
        name_width, shape_width = (max(len(row[column]) for row in rows) for column in (0, 1))
        for key, shape, tensor in rows:
            dtype = str(tensor.dtype).removeprefix("torch.")
            print(f"{key:<{name_width}}  {shape:<{shape_width}}  {dtype:<8}  {num_bytes(tensor):>16,} bytes")
    _integrity(model, read=config.checksums)


def _describe(model: Model) -> Iterator[tuple[str, str]]:
    config = model.config
    yield "path", str(model.path)
    yield "format", _NAMES[model.kind]
    yield "model", config.name
    head = f"reward model: {', '.join(model.reward['attributes'])}" if model.reward else "policy (language model)"
    yield "kind", head
    if model.reward:
        weights = model.reward["weights"] or {}
        yield "reward weights", ", ".join(f"{name} {value:g}" for name, value in weights.items()) or "none stored"
    count = sum(math.prod(tensor.shape) for tensor in model.tensors.values())
    yield "parameters", f"{count:,}"
    yield "weights", f"{sum(map(num_bytes, model.tensors.values())):,} bytes, {DTYPE_NAMES[model.dtype]}"
    heads = (config.num_attention_heads, config.num_query_groups, head_dim(config))
    yield "layers", str(config.num_layers)
    yield "hidden size", f"{config.hidden_size:,}; feed-forward {config.ffn_hidden_size:,}"
    yield "attention", "{} heads, {} key-value heads, head size {}".format(*heads)
    yield "rotary", f"{config.rotary_percent:g} of each head, base {config.rotary_base:,}"
    yield "vocabulary", f"{config.vocab_size:,} tokens"
    yield "context", f"{config.max_sequence_length:,} tokens"
    yield "tokenizer", _tokenizer(model)
    if model.kind == "megatron":
        yield from _of_a_run(model)
    elif model.verb != "convert":
        yield "stage", f"{model.verb}, step {model.step}" if model.step else model.verb


def _tokenizer(model: Model) -> str:
    with tokenizer_folder(model) as folder:
        if folder is None:
            return "none"
        tokenizer = load_tokenizer(folder)
        kind = type(tokenizer).__name__.removesuffix("Tokenizer")
        return f"{kind}, {tokenizer.vocab_size:,} tokens, fingerprint {tokenizer.fingerprint[:12]}"


def _of_a_run(model: Model) -> Iterator[tuple[str, str]]:
    manifest = store.read_manifest(model.path)
    layout = manifest["layout"]
    yield "stage", f"{model.verb}, step {model.step}, {'final' if manifest['final'] else 'periodic'}"
    written = ", ".join(f"{name} {layout[name]}" for name in layout if name != "world_size")
    yield "written under", f"{written} ({layout.get('world_size', 1)} processes)"
    sharding = manifest["optimizer_sharding"]
    loads = {
        None: "none: weights only, for checkpoint.init_from",
        "dp_reshardable": "resumes under the same tensor, pipeline and virtual_pipeline, any data",
        "fully_reshardable": "resumes under any layout",
        "replicated": "resumes under any layout, with parallel.distributed_optimizer=false",
    }
    yield "optimizer", loads.get(sharding, str(sharding))
    yield "written by", f"megatron-core {manifest['megatron_core']}, torch {manifest['torch']}"
    if model.run_dir is not None:
        others = [path.name for path in store.candidates(model.run_dir) if path != model.path]
        yield "run", f"{model.run_dir}" + (f"; also there: {', '.join(others)}" if others else "")


def _integrity(model: Model, *, read: bool) -> None:
    """Say whether the files are what was written; opening has compared lengths and headers already."""
    if not model.files:
        print("integrity: headers and lengths agree; there are no checksums to compare")
        return
    problems = []
    for name, entry in model.files.items():
        path = model.path / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size:,} bytes, {entry['bytes']:,} expected")
        elif read and (problem := checksums.problem_of(path, name, entry)) is not None:
            problems.append(problem)
    if problems:
        raise ValueError(f"{model.path} is damaged: {'; '.join(problems[:6])}")
    total = sum(entry["bytes"] for entry in model.files.values())
    found = f"{len(model.files)} files, {total:,} bytes"
    print(f"integrity: {found}: " + ("every checksum agrees" if read else "lengths agree (checksums=true reads them)"))
