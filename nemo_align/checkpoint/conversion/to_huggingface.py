"""A `Model` as a Hugging Face folder.

A policy becomes NemotronForCausalLM. A reward model becomes NemotronForSequenceClassification, its head's bias folded
into the final norm (huggingface/reward_head.py); final norm and head are fp32 whatever the rest is.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from nemo_align.checkpoint import checksums
from nemo_align.checkpoint.conversion.model import DTYPE_NAMES, TORCH_DTYPES, Model, listed, origin_of, tokenizer_folder
from nemo_align.checkpoint.conversion.model_card import model_card
from nemo_align.checkpoint.conversion.record import RECORD_FILE, record_of
from nemo_align.checkpoint.conversion.target import Planned, Target, planned
from nemo_align.checkpoint.huggingface import qkv, reward_head
from nemo_align.checkpoint.huggingface.generation_config import generation_config
from nemo_align.checkpoint.huggingface.model_config import hf_config
from nemo_align.checkpoint.huggingface.weight_map import (
    FINAL_NORM_BIAS,
    HEAD_BIAS,
    HEAD_WEIGHT,
    QKV,
    SCORE,
    Weight,
    weight_map,
)
from nemo_align.checkpoint.huggingface.whole_text import REMEDY
from nemo_align.checkpoint.keys import HEAD_PREFIX
from nemo_align.checkpoint.manifest import write_durably
from nemo_align.checkpoint.streaming import safetensors, transfer
from nemo_align.checkpoint.streaming.safetensors import Shard
from nemo_align.checkpoint.streaming.tensors import HeldTensor, RowSource, converted, read
from nemo_align.checkpoint.streaming.torch_dist import slabs
from nemo_align.config.hf_model import CONFIG_FILE
from nemo_align.config.model import ModelConfig
from nemo_align.model.counts import head_dim

logger = logging.getLogger("nemo_align")


def to_huggingface(
    model: Model, *, dtype: str | None = None, max_shard_bytes: int = safetensors.DEFAULT_SHARD_BYTES
) -> Target:
    """Lay out the folder.

    Args:
        dtype: fp32 | bf16; None keeps the model's.

    Raises:
        ValueError: a number format that is not offered, or a head whose bias cannot be folded.
    """
    body = body_dtype(model, dtype)
    note_rounding(model, body)
    tensors, sources = _tensors(model, body)
    shards = safetensors.lay_out(tensors, max_shard_bytes)
    kept = _kept_head(model)
    parts: list[transfer.Part] = []
    table: list[Planned] = []
    for shard in [*shards, *kept]:
        parts.append(transfer.fixed(shard.file, shard.header))
        position = len(shard.header)
        for name, source in shard.tensors.items():
            for first, last in slabs(source, transfer.PART_BYTES):
                parts.append(transfer.rows(shard.file, position, name, source, first, last))
                position += parts[-1].num_bytes
    for shard in shards:
        table += [
            planned(name, source, model.stored.get(sources[name], sources[name]), shard.file)
            for name, source in shard.tensors.items()
        ]
    index = safetensors.index_of(shards)

    def write_small(folder: Path) -> None:
        _write_small(folder, model, DTYPE_NAMES[body])

    def seal(folder: Path, job: str, files: dict[str, dict]) -> None:
        if index is not None:
            write_durably(folder / safetensors.INDEX, index)
            files = files | {safetensors.INDEX: checksums.entry_of_file(folder / safetensors.INDEX)}
        write_durably(folder / RECORD_FILE, record_of(job, origin_of(model), files))

    options = {"to": "hf", "dtype": DTYPE_NAMES[body], "max_shard_bytes": max_shard_bytes}
    return Target(parts=parts, planned=table, write_small=write_small, seal=seal, options=options)


def body_dtype(model: Model, dtype: str | None) -> torch.dtype:
    """The number format to write; refuses what neither side takes."""
    if dtype is not None:
        if dtype not in TORCH_DTYPES:
            raise ValueError(f"dtype={dtype} is unknown: choose from {', '.join(TORCH_DTYPES)}")
        return TORCH_DTYPES[dtype]
    if model.dtype not in TORCH_DTYPES.values():
        name = safetensors.DTYPE_NAMES.get(model.dtype, str(model.dtype))
        raise ValueError(f"{model.path} holds {name} weights: set dtype=bf16 or dtype=fp32")
    return model.dtype


def note_rounding(model: Model, body: torch.dtype) -> None:
    """Tell the user which tensors lose digits; a reward head never does."""
    wider = [
        key
        for key, tensor in model.tensors.items()
        if tensor.dtype.itemsize > body.itemsize and not key.startswith(HEAD_PREFIX)
    ]
    if wider and model.kind != "merge":
        model.notes.append(f"rounded to {DTYPE_NAMES[body]}: {listed(wider)}. dtype=fp32 keeps every digit")


def to_hf(weight: Weight, tensor: RowSource, config: ModelConfig) -> tuple[RowSource, ...]:
    """The Hugging Face tensors of one Megatron-core tensor without vocabulary padding."""
    if weight.how == QKV:
        return qkv.ungroup(tensor, num_groups=config.num_query_groups, head_dim=head_dim(config))
    return (tensor,)


def huggingface_tensors(model: Model, body: torch.dtype) -> dict[str, RowSource]:
    """Every tensor of the folder by its name there."""
    return _tensors(model, body)[0]


def _tensors(model: Model, body: torch.dtype) -> tuple[dict[str, RowSource], dict[str, str]]:
    """Tensors by Hugging Face's name, and the names that they come from."""
    tensors: dict[str, RowSource] = {}
    sources: dict[str, str] = {}
    folded = None if model.reward is None else _folded_norm_bias(model)
    for weight in weight_map(model.config, has_output_layer=model.reward is None):
        tensor, dtype = model.tensors[weight.megatron], body
        if folded is not None and weight.megatron.startswith("decoder.final_layernorm."):
            dtype = torch.float32
            if weight.megatron == FINAL_NORM_BIAS:
                tensor = folded
        for name, part in zip(weight.hf, to_hf(weight, tensor, model.config), strict=True):
            tensors[name], sources[name] = converted(part, dtype, name), weight.megatron
    if model.reward is not None:
        tensors[SCORE] = converted(model.tensors[HEAD_WEIGHT], torch.float32, SCORE)
        sources[SCORE] = HEAD_WEIGHT
    return tensors, sources


def _folded_norm_bias(model: Model) -> RowSource:
    bias = read(model.tensors[FINAL_NORM_BIAS])
    if not model.has_head_bias:
        return HeldTensor(bias.float())
    return HeldTensor(reward_head.fold_bias(read(model.tensors[HEAD_WEIGHT]), read(model.tensors[HEAD_BIAS]), bias))


def _kept_head(model: Model) -> list[Shard]:
    """The head as it was trained, beside the model."""
    if model.reward is None:
        return []
    names = {HEAD_WEIGHT: reward_head.WEIGHT, FINAL_NORM_BIAS: reward_head.NORM_BIAS, HEAD_BIAS: reward_head.BIAS}
    return [
        Shard(
            reward_head.HEAD_FILE,
            {name: model.tensors[key] for key, name in names.items() if key in model.tensors},
        )
    ]


def _write_small(folder: Path, model: Model, dtype: str) -> None:
    from nemo_align.checkpoint.huggingface.tokenizer_files import write_tokenizer
    from nemo_align.checkpoint.huggingface.whole_text import joins_across_turns

    tokenizer, joins = None, False
    with tokenizer_folder(model) as source:
        if source is not None:
            tokenizer = write_tokenizer(
                source, folder, is_reward=model.reward is not None, max_length=model.config.max_sequence_length
            )
            if joins := joins_across_turns(folder, tokenizer):
                logger.warning(
                    "the vocabulary joins newlines with their neighbours: a dialogue that is encoded as one text has "
                    "other tokens than in training. %s",
                    REMEDY,
                )
    ids = {} if tokenizer is None else {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    config = hf_config(
        model.config,
        dtype=dtype,
        bos_id=ids.get("bos"),
        eos_id=ids.get("eos"),
        pad_id=ids.get("pad"),
        reward=model.reward,
    )
    _write_json(folder / CONFIG_FILE, config)
    if model.reward is None and tokenizer is not None:
        _write_json(folder / "generation_config.json", generation_config(tokenizer, model.verb))
    card = model_card(model, tokenizer, dtype=dtype, joins_across_turns=joins)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
