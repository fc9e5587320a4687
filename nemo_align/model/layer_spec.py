"""Which modules the decoder is made of: Transformer Engine's on a GPU, Megatron-core's local ones on a CPU."""

from __future__ import annotations

import importlib.util

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_align.model.attention import SdpaCoreAttention
from nemo_align.model.layernorm1p import LayerNorm1P
from nemo_align.runtime.device import use_gpu


def decoder_spec(
    config: TransformerConfig, *, virtual_stage: int | None, pipeline_rank: int
) -> TransformerBlockSubmodules:
    """Spec of one model chunk's decoder. Both kinds give distributed checkpoints with the same keys."""
    num_layers = get_num_layers_to_build(config, vp_stage=virtual_stage, pp_rank=pipeline_rank)
    if use_gpu():
        layer, norm = _transformer_engine_layer()
    else:
        layer, norm = local_layer_spec(), LayerNorm1P
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def local_layer_spec() -> ModuleSpec:
    """Megatron-core's local layer with LayerNorm1P and attention on torch's SDPA.

    Its sharded_state_dict_keys_map stays: it names the two norms in a checkpoint as Transformer Engine does, where
    they are fused into linear_qkv and linear_fc1.
    """
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = LayerNorm1P
    layer.submodules.pre_mlp_layernorm = LayerNorm1P
    layer.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    return layer


def _transformer_engine_layer() -> tuple[ModuleSpec, type]:
    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError("a GPU is there but Transformer Engine is not: pip install 'nemo_align[gpu]'")
    # Not at the top: the name exists only where Transformer Engine does.
    from megatron.core.extensions.transformer_engine import TENorm

    return get_gpt_layer_with_transformer_engine_spec(), TENorm
