"""A Megatron checkpoint as a Hugging Face folder.

Reads the distributed checkpoint's files directly, one tensor at a time: no process group, no model, no GPU.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nemo_align.checkpoint.huggingface import qkv, reward_head
from nemo_align.checkpoint.huggingface.model_card import model_card
from nemo_align.checkpoint.huggingface.model_config import hf_config
from nemo_align.checkpoint.huggingface.publish import whole_folder
from nemo_align.checkpoint.huggingface.safetensors_files import DEFAULT_SHARD_BYTES, SafetensorsWriter
from nemo_align.checkpoint.huggingface.tokenizer_files import write_tokenizer
from nemo_align.checkpoint.huggingface.weight_map import (
    FINAL_NORM_BIAS,
    HEAD_BIAS,
    HEAD_WEIGHT,
    QKV,
    SCORE,
    Weight,
    weight_map,
)
from nemo_align.checkpoint.huggingface.whole_text import REMEDY, joins_across_turns
from nemo_align.checkpoint.manifest import check_checksums
from nemo_align.checkpoint.storage import TensorReader
from nemo_align.checkpoint.store import resolve
from nemo_align.config.hf_model import CONFIG_FILE
from nemo_align.config.model import ModelConfig
from nemo_align.data.chat_template import TURN_START
from nemo_align.data.tokenizer import Tokenizer
from nemo_align.model.counts import head_dim
from nemo_align.runtime import watchdog

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CHAT_VERBS = ("sft", "preference")  # their models end a turn with the token that opens the next

logger = logging.getLogger("nemo_align")


def export_hf(
    checkpoint_dir: Path | str,
    target: Path | str,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Write the policy or reward model in `checkpoint_dir` (a checkpoint or a run directory) to `target`.

    A policy becomes NemotronForCausalLM. A reward model becomes NemotronForSequenceClassification, its head's bias
    folded into the final norm (reward_head.py); final norm and head are fp32 whatever the rest is.

    Args:
        dtype: fp32 | bf16; None keeps the checkpoint's.
        overwrite: replace `target` if it exists.
        verify: check the files against the manifest's checksums first.

    Raises:
        ValueError: not a Megatron checkpoint, damaged, tensors missing, left over or of another shape (listed),
            `target` exists, or a head whose bias cannot be folded.
    """
    reference = resolve(checkpoint_dir)
    if reference.kind != "megatron":
        raise ValueError(f"{checkpoint_dir} is a Hugging Face folder already")
    manifest = reference.manifest
    if verify and (problems := check_checksums(reference.path, manifest, list(manifest["files"]))):
        raise ValueError(f"checkpoint {reference.path} is damaged: {'; '.join(problems[:3])}; use an older one")
    model = ModelConfig(**manifest["model"])
    reader = TensorReader(reference.path)
    weights = weight_map(model, has_output_layer=manifest["reward"] is None)
    _check_tensors(reader, weights, model, manifest["reward"])

    with whole_folder(Path(target), overwrite=overwrite) as folder:
        tokenizer, joins = None, False
        if manifest["tokenizer"] is not None:
            tokenizer = write_tokenizer(
                reference.path / manifest["tokenizer"],
                folder,
                is_reward=manifest["reward"] is not None,
                max_length=model.max_sequence_length,
            )
            if joins := joins_across_turns(folder, tokenizer):
                logger.warning(
                    "the vocabulary joins newlines with their neighbours: a dialogue that is encoded as one text has "
                    "other tokens than in training. %s",
                    REMEDY,
                )
        _write_configs(folder, model, manifest, tokenizer, dtype or manifest["dtype"])
        _write_weights(folder, reader, weights, model, manifest, dtype, max_shard_bytes)
        card = model_card(reference.path, manifest, model, tokenizer, joins_across_turns=joins)
        (folder / "README.md").write_text(card, encoding="utf-8")
    logger.info("exported %s to %s", reference.path, target)
    return Path(target)


def _check_tensors(reader: TensorReader, weights: list[Weight], model: ModelConfig, reward: dict | None) -> None:
    expected = {weight.megatron: weight.megatron_shape for weight in weights}
    if reward is not None:
        expected[HEAD_WEIGHT] = (len(reward["attributes"]), model.hidden_size)
        if reward["head_bias"]:
            expected[HEAD_BIAS] = (len(reward["attributes"]),)
    with_padding = {weight.megatron for weight in weights if weight.has_vocabulary_rows}
    stored = {key for key in reader.names() if not key.startswith(("optimizer.", "chained_"))}
    problems = []
    if missing := sorted(expected.keys() - stored):
        problems.append(f"missing: {', '.join(missing[:6])} ({len(missing)} in all)")
    if left := sorted(stored - expected.keys()):
        problems.append(f"left over: {', '.join(left[:6])} ({len(left)} in all)")
    for key in sorted(expected.keys() & stored):
        found, wanted = reader.shape(key), expected[key]
        fits = found[1:] == wanted[1:] and found[0] >= wanted[0] if key in with_padding else found == wanted
        if not fits:
            problems.append(f"{key} has shape {list(found)}, {list(wanted)} expected")
    if problems:
        raise ValueError(
            f"{reader.folder} does not hold the model that its manifest describes: {'; '.join(problems[:8])}"
        )


def _write_configs(folder: Path, model: ModelConfig, manifest: dict, tokenizer: Tokenizer | None, dtype: str) -> None:
    bos_id, eos_id, pad_id = (
        (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if tokenizer is not None else (None, None, None)
    )
    _write_json(
        folder / CONFIG_FILE,
        hf_config(model, dtype=dtype, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, reward=manifest["reward"]),
    )
    if manifest["reward"] is None and tokenizer is not None:
        _write_json(folder / "generation_config.json", generation_config(tokenizer, manifest["verb"]))


def generation_config(tokenizer: Tokenizer, verb: str) -> dict[str, int | list[int]]:
    """generation_config.json: how a text begins, what ends it, and what fills a batch."""
    stops = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    turn_start = tokenizer.find_control_id(TURN_START)
    if verb in _CHAT_VERBS and turn_start is not None:
        stops.append(turn_start)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops, "pad_token_id": tokenizer.pad_id}
    return {key: value for key, value in ids.items() if value is not None and value != []}  # 0 is an id


def _write_weights(
    folder: Path,
    reader: TensorReader,
    weights: list[Weight],
    model: ModelConfig,
    manifest: dict,
    dtype: str | None,
    max_shard_bytes: int,
) -> None:
    is_reward = manifest["reward"] is not None

    def format_of(weight: Weight) -> torch.dtype:
        if is_reward and weight.megatron.startswith("decoder.final_layernorm."):
            return torch.float32
        return reader.dtype(weight.megatron) if dtype is None else TORCH_DTYPES[dtype]

    plan = [
        (name, format_of(weight), shape)
        for weight in weights
        for name, shape in zip(weight.hf, weight.hf_shapes, strict=True)
    ]
    if is_reward:
        plan.append((SCORE, torch.float32, (len(manifest["reward"]["attributes"]), model.hidden_size)))
    writer = SafetensorsWriter(folder, plan, max_shard_bytes=max_shard_bytes)
    norm_bias = _write_head(folder, reader) if is_reward else None
    for weight in weights:
        watchdog.beat(f"exporting {weight.megatron}")
        tensor = reader.read(weight.megatron)
        if weight.megatron == FINAL_NORM_BIAS and norm_bias is not None:
            tensor = norm_bias
        for name, part in zip(weight.hf, to_hf(weight, tensor, model), strict=True):
            writer.write(name, part.to(format_of(weight)))
    if is_reward:
        writer.write(SCORE, reader.read(HEAD_WEIGHT).float())
    writer.finish()


def to_hf(weight: Weight, tensor: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """The Hugging Face tensors of one Megatron-core tensor: query, key and value apart, padding rows cut off."""
    if weight.how == QKV:
        return qkv.ungroup(tensor, num_groups=model.num_query_groups, head_dim=head_dim(model))
    return (tensor[: weight.hf_shapes[0][0]],)


def _write_head(folder: Path, reader: TensorReader) -> Tensor:
    """Keep the head as it was trained beside the model; returns the final norm's bias with the head's folded in."""
    norm_bias = reader.read(FINAL_NORM_BIAS)
    kept = {reward_head.WEIGHT: reader.read(HEAD_WEIGHT), reward_head.NORM_BIAS: norm_bias}
    folded = norm_bias.float()
    if HEAD_BIAS in reader:
        kept[reward_head.BIAS] = reader.read(HEAD_BIAS)
        folded = reward_head.fold_bias(kept[reward_head.WEIGHT], kept[reward_head.BIAS], norm_bias)
    save_file(kept, folder / reward_head.HEAD_FILE, metadata={"format": "pt"})
    return folded


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
