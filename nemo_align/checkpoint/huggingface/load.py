"""Hugging Face weights into a model that is already cut over ranks: each rank reads only its own slices."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from nemo_align.checkpoint.architecture import architecture_problems
from nemo_align.checkpoint.huggingface.folder import HuggingFaceWeights
from nemo_align.checkpoint.huggingface.weight_map import HEAD_BIAS, HEAD_WEIGHT, OUTPUT, Weight
from nemo_align.checkpoint.streaming.tensors import StoredTensor, read
from nemo_align.config.hf_model import hf_model_config
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
                    _copy(read(source.head(shard.key)), shard, folder)
                continue
            _fill_shard(source, shard)

    agree(fill)
    if OUTPUT not in keys and not load_head:
        logger.info("the reward head stays as initialised")
    logger.info("weights of %s", folder)


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
    tensor = source.tensors[shard.key]
    first, *rest = (
        slice(begin, begin + size) for begin, size in zip(shard.global_offset, shard.local_shape, strict=True)
    )
    rows = slice(min(first.start, tensor.shape[0]), min(first.stop, tensor.shape[0]))
    if not rest or rest[0] == slice(0, tensor.shape[1]):
        part = read(tensor, rows.start, rows.stop)
    else:  # the matrices that tensor parallelism cuts along columns stand in the file as they are
        assert isinstance(tensor, StoredTensor), shard.key
        part = tensor.read_box(rows, rest[0])
    shard.data[: part.shape[0]].copy_(part)


def _copy(tensor: Tensor, shard, folder: Path) -> None:
    if tuple(tensor.shape) != tuple(shard.local_shape):
        raise ValueError(
            f"{folder}: {shard.key} has shape {list(tensor.shape)}, the model's is {list(shard.local_shape)}: "
            "reward.attributes must be those of the checkpoint"
        )
    shard.data.copy_(tensor)
