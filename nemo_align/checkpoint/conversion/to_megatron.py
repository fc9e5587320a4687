"""A `Model` as a Megatron checkpoint of ours, which loads under any layout."""

from __future__ import annotations

import io
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from nemo_align.checkpoint import manifest as manifests
from nemo_align.checkpoint.conversion.model import DTYPE_NAMES, Model, origin_of, tokenizer_folder
from nemo_align.checkpoint.conversion.target import Planned, Target, planned
from nemo_align.checkpoint.conversion.to_huggingface import body_dtype, note_rounding
from nemo_align.checkpoint.huggingface.weight_map import weight_map
from nemo_align.checkpoint.keys import HEAD_PREFIX
from nemo_align.checkpoint.safe_reading import METADATA_FILE
from nemo_align.checkpoint.streaming import torch_dist, transfer
from nemo_align.checkpoint.streaming.tensors import converted
from nemo_align.data.tokenizer import load_tokenizer

TOKENIZER = "tokenizer"
_ONE_PROCESS = {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "data": 1, "sequence": False, "world_size": 1}


def to_megatron(model: Model, *, dtype: str | None = None) -> Target:
    """Lay out the checkpoint.

    Args:
        dtype: fp32 | bf16; None keeps the model's. A reward head is fp32 always.

    Raises:
        ValueError: a number format that is not offered.
    """
    body = body_dtype(model, dtype)
    note_rounding(model, body)
    tensors = {
        key: converted(source, torch.float32 if key.startswith(HEAD_PREFIX) else body, key)
        for key, source in model.tensors.items()
    }
    files = torch_dist.lay_out(tensors, transfer.PART_BYTES)
    names = {weight.megatron: weight.hf for weight in weight_map(model.config, has_output_layer=model.reward is None)}
    places: dict[str, list[str]] = {}
    for file in files:
        for piece in file.stretches:
            places.setdefault(piece.key, []).append(file.name)
    parts: list[transfer.Part] = []
    table: list[Planned] = []
    for file in files:
        for piece in file.stretches:
            parts.append(
                transfer.archive(
                    file.name, piece.start, piece.key, piece.source, piece.first, piece.last, piece.wrapper
                )
            )
            if piece.first == 0:
                known = names.get(piece.key, (piece.key,)) if model.kind == "hf" else (piece.key,)
                of = model.stored.get(piece.key, ", ".join(known))
                first, last = places[piece.key][0], places[piece.key][-1]
                where = first if first == last else f"{first} to {last}"
                table.append(planned(piece.key, piece.source, of, where))

    def write_small(folder: Path) -> None:
        manifests.write_durably(folder / METADATA_FILE, torch_dist.metadata_of(files))
        manifests.write_durably(folder / torch_dist.COMMON_FILE, _empty_common())
        manifests.write_durably(folder / torch_dist.CONFIG_FILE, torch_dist.config_of())
        with tokenizer_folder(model) as source:
            if source is not None:
                load_tokenizer(source).save(folder / TOKENIZER)

    def seal(folder: Path, job: str, entries: dict[str, dict]) -> None:
        described = {
            "verb": model.verb,
            "step": model.step,
            "final": True,
            "model": asdict(model.config),
            "reward": model.reward,
            "layout": _ONE_PROCESS,
            "optimizer_sharding": None,
            "dtype": DTYPE_NAMES[body],
            "tokenizer": None if model.tokenizer is None else TOKENIZER,
            "state": {},
            "job": job,
            "origin": origin_of(model),
            "files": dict(sorted(entries.items())),
            "megatron_core": version("megatron-core"),
            "torch": torch.__version__,
        }
        manifests.write_manifest(folder, described)

    options = {"to": "megatron", "dtype": DTYPE_NAMES[body]}
    return Target(parts=parts, planned=table, write_small=write_small, seal=seal, options=options)


def _empty_common() -> bytes:
    buffer = io.BytesIO()
    torch.save({}, buffer)
    return buffer.getvalue()
