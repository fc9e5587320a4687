"""Builds this rank's model chunks from the configuration."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import distributed

from nemo_align.config.model import ModelConfig
from nemo_align.config.objectives import RewardConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.model import attention_kernels
from nemo_align.model.counts import padded_vocab_size
from nemo_align.model.initial_weights import generator_of, initialize_weights
from nemo_align.model.layer_spec import decoder_spec
from nemo_align.model.megatron import GPTModel
from nemo_align.model.reward_head import RewardModel
from nemo_align.model.rotary import PackedRotaryEmbedding
from nemo_align.model.transformer_config import build_transformer_config
from nemo_align.runtime.device import use_gpu
from nemo_align.runtime.topology import Topology


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    topology: Topology,
    *,
    reward_head: RewardConfig | None = None,
) -> list[GPTModel]:
    """This rank's model chunks, one per virtual pipeline stage, with random weights.

    Call as `chunk(tokens [B, S], position_ids [B, S], None, packed_seq_params=...)`. The last chunk of the last stage
    returns logits [B, S, V_padded / tensor] in the model's number format, or, with reward_head, fp32 scores
    [B, S, attributes] that are equal on all tensor ranks; other chunks return hidden states [S, B, H] (S / tensor under
    sequence parallel). Weights are in precision.dtype (the reward head's in fp32) and depend on the seed of rank 0's
    torch generator, not on the layout.

    Raises ValueError for a layout or precision that the model or the machine cannot have.
    """
    config = build_transformer_config(model, parallel, precision)
    if use_gpu():
        attention_kernels.clear()
    seed = _common_seed(topology)
    chunks = []
    for virtual_stage in range(parallel.virtual_pipeline):
        chunk = _build_chunk(model, parallel, config, topology, virtual_stage, reward_head)
        initialize_weights(chunk, model, seed)
        if reward_head is not None and chunk.post_process:
            _initialize_head(chunk, model, reward_head, seed)
        chunks.append(chunk.to(topology.device) if not _is_meta(chunk) else chunk)
    if use_gpu():
        attention_kernels.allow(precision.attention)
    return chunks


def _build_chunk(
    model: ModelConfig,
    parallel: ParallelConfig,
    config: TransformerConfig,
    topology: Topology,
    virtual_stage: int,
    reward_head: RewardConfig | None,
) -> GPTModel:
    vp_stage = virtual_stage if parallel.virtual_pipeline > 1 else None
    model_class, reward_argument = (GPTModel, {}) if reward_head is None else (RewardModel, {"reward": reward_head})
    chunk = model_class(
        config=config,
        transformer_layer_spec=decoder_spec(config, virtual_stage=vp_stage, pipeline_rank=topology.pipeline_rank),
        vocab_size=padded_vocab_size(model, parallel.tensor),
        max_sequence_length=model.max_sequence_length,
        pre_process=topology.is_first_stage and virtual_stage == 0,
        post_process=topology.is_last_stage and virtual_stage == parallel.virtual_pipeline - 1,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
        **reward_argument,
    )
    if not config.apply_rope_fusion:
        chunk.rotary_pos_emb = PackedRotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=model.rotary_percent,
            rotary_base=model.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
        )
    return chunk


@torch.no_grad()
def _initialize_head(chunk: RewardModel, model: ModelConfig, reward: RewardConfig, seed: int) -> None:
    weight = chunk.reward_head.weight
    if weight.is_meta:
        return
    std = model.init_std if reward.head_init_std is None else reward.head_init_std
    weight.normal_(0.0, std, generator=generator_of("reward_head.weight", seed, weight.device))


def _common_seed(topology: Topology) -> int:
    """The seed of rank 0's generator: ranks may have seeds of their own, the model has one."""
    seed = torch.tensor([torch.initial_seed() % 2**63], dtype=torch.int64, device=topology.device)
    distributed.broadcast(seed, src=0)
    return int(seed.item())


def _is_meta(chunk: GPTModel) -> bool:
    return next(chunk.parameters()).is_meta
