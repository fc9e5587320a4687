"""Hugging Face weights into a model that is already cut over ranks: each rank reads only its own slices."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nemo_align.checkpoint.architecture import architecture_problems
from nemo_align.checkpoint.huggingface import qkv, reward_head
from nemo_align.checkpoint.huggingface.safetensors_files import SafetensorsFolder
from nemo_align.checkpoint.huggingface.weight_map import (
    FINAL_NORM_BIAS,
    HEAD_BIAS,
    HEAD_WEIGHT,
    OUTPUT,
    QKV,
    SCORE,
    Weight,
    weight_map,
)
from nemo_align.config.hf_model import hf_model_config, hf_reward_config
from nemo_align.config.model import ModelConfig
from nemo_align.model.counts import head_dim
from nemo_align.runtime import watchdog
from nemo_align.runtime.topology import Topology

logger = logging.getLogger("nemo_align")


@torch.no_grad()
def load_hf_weights(
    folder: Path | str,
    model_chunks: list[torch.nn.Module],
    topology: Topology,
    *,
    load_head: bool = False,
) -> None:
    """Fill `model_chunks` from the safetensors in `folder`, under any layout; vocabulary padding rows become zero.

    Collective. A policy's or a reward model's folder serves a reward model; its head is read only with `load_head`,
    from `reward_head.safetensors` (exact) if we exported it, else from `score.weight` with a bias of zero.

    Raises:
        ValueError: another architecture (with the differing settings), tensors missing, unexpected or of another shape
            (listed), a reward model where a policy is asked for, `load_head` without a head.
    """
    # Here and not above: `convert` uses its neighbours without Megatron-core.
    from nemo_align.checkpoint.sharded_state import bare_model, model_state
    from nemo_align.runtime.agreement import agree, gather

    folder = Path(folder)
    model = hf_model_config(folder)
    shards = [shard for chunk in model_state(model_chunks, None).values() for shard in chunk.values()]
    keys = {key for part in gather([shard.key for shard in shards]) for key in part}

    def fill() -> None:
        if problems := architecture_problems(model, bare_model(model_chunks[0])):
            raise ValueError(f"{folder} does not fit the model: {'; '.join(problems)}")
        wants_policy = OUTPUT in keys
        source = HuggingFaceWeights(folder, model, with_output_layer=wants_policy)
        if load_head and not wants_policy and not source.has_head:
            raise ValueError(f"reward.load_head=true, but {folder} has no reward head: set reward.load_head=false")
        for shard in shards:
            watchdog.beat(f"reading {shard.key} of {folder}")
            if shard.key in (HEAD_WEIGHT, HEAD_BIAS):
                if load_head:
                    _copy(source.head(shard.key), shard, folder)
                continue
            _fill_shard(source, shard)

    agree(fill)
    if OUTPUT not in keys and not load_head:
        logger.info("the reward head stays as initialised")
    logger.info("weights of %s", folder)


class HuggingFaceWeights:
    """The tensors of a Hugging Face folder under Megatron-core's names, whole or in slices.

    Raises ValueError on tensors that are missing, unexpected or of another shape than config.json says.
    """

    def __init__(self, folder: Path, model: ModelConfig, *, with_output_layer: bool) -> None:
        self.folder, self.model = folder, model
        self.files = SafetensorsFolder(folder)
        self.has_head = SCORE in self.files.names()
        if with_output_layer and self.has_head:
            raise ValueError(f"{folder} is a reward model: it has no output layer to start a policy from")
        self.weights = {weight.megatron: weight for weight in weight_map(model, has_output_layer=with_output_layer)}
        self._kept = self._read_kept_head()
        self._check()

    def read(self, key: str) -> Tensor:
        """The whole tensor, without vocabulary padding."""
        weight = self.weights[key]
        return self.read_slice(key, (0,) * len(weight.megatron_shape), weight.megatron_shape)

    def read_slice(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """Part of a tensor. Rows beyond the vocabulary are left out: the result may have fewer than asked for."""
        weight = self.weights[key]
        parts = [slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True)]
        if weight.how == QKV:
            model = self.model
            rows = qkv.sources(
                offset[0],
                offset[0] + shape[0],
                num_heads=model.num_attention_heads,
                num_groups=model.num_query_groups,
                head_dim=head_dim(model),
            )
            pieces = [self.files.read(weight.hf[which], slice(begin, end), parts[1]) for which, begin, end in rows]
            return torch.cat(pieces)
        if key == FINAL_NORM_BIAS and reward_head.NORM_BIAS in self._kept:
            return self._kept[reward_head.NORM_BIAS][tuple(parts)]  # before the head's bias was folded in
        rows_there = weight.hf_shapes[0][0]
        parts[0] = slice(min(parts[0].start, rows_there), min(parts[0].stop, rows_there))
        return self.files.read(weight.hf[0], *parts)

    def head(self, key: str) -> Tensor:
        """reward_head.weight or reward_head.bias, as trained where we know it."""
        if key == HEAD_WEIGHT:
            return self._kept[reward_head.WEIGHT] if self._kept else self.files.read(SCORE)
        if reward_head.BIAS in self._kept:
            return self._kept[reward_head.BIAS]
        return torch.zeros(self.files.shape(SCORE)[0])

    def _read_kept_head(self) -> dict[str, Tensor]:
        path = self.folder / reward_head.HEAD_FILE
        if not (self.has_head and path.is_file()):
            return {}
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None

    def _check(self) -> None:
        expected = {
            name: shape
            for weight in self.weights.values()
            for name, shape in zip(weight.hf, weight.hf_shapes, strict=True)
        }
        stored = self.files.names()
        reward = hf_reward_config(self.folder)
        if self.has_head and reward is not None:
            expected[SCORE] = (len(reward.attributes), self.model.hidden_size)
        # A reward model that starts from a policy leaves its output layer; older files store the rotary frequencies.
        ignored = {SCORE, "lm_head.weight"} | {name for name in stored if name.endswith("rotary_emb.inv_freq")}
        problems = []
        if missing := sorted(expected.keys() - stored):
            problems.append(f"missing: {', '.join(missing[:6])} ({len(missing)} in all)")
        if left := sorted(stored - expected.keys() - ignored):
            problems.append(f"unexpected: {', '.join(left[:6])} ({len(left)} in all)")
        for name in sorted(expected.keys() & stored):
            if (found := self.files.shape(name)) != expected[name]:
                problems.append(f"{name} has shape {list(found)}, config.json means {list(expected[name])}")
        if problems:
            raise ValueError(
                f"{self.folder} does not hold the model that its config.json describes: {'; '.join(problems[:8])}"
            )


def _fill_shard(source: HuggingFaceWeights, shard) -> None:
    weight: Weight | None = source.weights.get(shard.key)
    assert weight is not None, f"no Hugging Face counterpart of {shard.key}"
    wanted = weight.megatron_shape
    if weight.has_vocabulary_rows:
        if shard.global_shape[0] < wanted[0]:
            raise ValueError(
                f"{source.folder} has {wanted[0]} tokens, the model embeds {shard.global_shape[0]}: "
                f"set model.vocab_size={wanted[0]}"
            )
        shard.data.zero_()
    else:
        assert tuple(shard.global_shape) == wanted, (shard.key, shard.global_shape, wanted)
    rows = source.read_slice(shard.key, tuple(shard.global_offset), tuple(shard.local_shape))
    shard.data[: rows.shape[0]].copy_(rows)


def _copy(tensor: Tensor, shard, folder: Path) -> None:
    if tuple(tensor.shape) != tuple(shard.local_shape):
        raise ValueError(
            f"{folder}: {shard.key} has shape {list(tensor.shape)}, the model's is {list(shard.local_shape)}: "
            "reward.attributes must be those of the checkpoint"
        )
    shard.data.copy_(tensor)
