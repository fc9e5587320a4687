"""The Nemotron architecture, the layout and the number formats as Megatron-core's TransformerConfig.

The position embedding, its percentage and the vocabulary are arguments of the model class, not of this config:
see build.py. Only fields whose default is not what we want are set.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_align.config.model import ModelConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.model.counts import bf16_layers, head_dim, overlaps_p2p
from nemo_align.model.megatron import CUDA_GRAPH_FIELDS
from nemo_align.runtime.device import use_gpu

PARAMETER_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Fields of Transformer Engine's recipes. Megatron-core's defaults (history 1, most recent) are not these values.
FP8_RECIPES: dict[str, dict[str, Any]] = {
    "delayed": {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"},
    "tensorwise": {},
    "blockwise": {},
}


def build_transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig
) -> TransformerConfig:
    """Megatron-core's config of the model on this machine (Transformer Engine with a GPU, local layers without).

    Raises ValueError for a layout or precision that the model or the machine cannot have.
    """
    _check_layout(model, parallel)
    dtype = _parameter_dtype(precision)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=head_dim(model),
        normalization="LayerNorm",
        layernorm_zero_centered_gamma=True,
        layernorm_epsilon=model.layernorm_epsilon,
        activation_func=squared_relu,
        gated_linear_unit=False,
        bias_activation_fusion=False,  # Megatron-core has no such fusion for squared ReLU
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Weights are filled by initial_weights.py, in a way that does not depend on the layout.
        init_method=_left_unset,
        output_layer_init_method=_left_unset,
        init_method_std=model.init_std,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision.dtype == "bf16",
        deallocate_pipeline_outputs=True,
        # The loss function returns a sum and a count, and gradients are divided by the global count.
        calculate_per_token_loss=True,
        **CUDA_GRAPH_FIELDS,
        **_recompute_fields(parallel),
        **_fp8_fields(precision),
        **(_gpu_fields(parallel, precision) if use_gpu() else _CPU_FIELDS),
    )


# What Megatron-core's local layers and gloo need (each of these is a CUDA kernel or an NCCL call).
_CPU_FIELDS: dict[str, Any] = {
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    # With the default, two ranks that are each other's neighbour on both sides (pipeline 2, interleaved) mix up
    # their tensors in silence on gloo.
    "batch_p2p_comm": False,
    "overlap_p2p_comm": False,
}


def _gpu_fields(parallel: ParallelConfig, precision: PrecisionConfig) -> dict[str, Any]:
    beside = overlaps_p2p(parallel)
    return {
        "transformer_impl": "transformer_engine",
        "use_cpu_initialization": False,
        "masked_softmax_fusion": True,
        "bias_dropout_fusion": False,  # nothing to fuse: no bias, no dropout
        "apply_rope_fusion": True,
        # Megatron-core's own linear layer (the output projection) needs this extension of Apex for it and fails
        # without; Transformer Engine's layers follow the same switch.
        "gradient_accumulation_fusion": importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        "persist_layer_norm": True,
        "batch_p2p_comm": not beside,
        "overlap_p2p_comm": beside,
        "tp_comm_overlap": parallel.overlap_tensor,
        "attention_backend": AttnBackend[precision.attention],
    }


def _recompute_fields(parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if parallel.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": parallel.recompute_layers,
        }
    if parallel.recompute == "block":  # the first layers of each chunk
        return {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": parallel.recompute_layers,
        }
    raise ValueError(f"parallel.recompute={parallel.recompute!r}: one of none, selective, full, block")


def _parameter_dtype(precision: PrecisionConfig) -> torch.dtype:
    if precision.dtype not in PARAMETER_DTYPE:
        raise ValueError(f"precision.dtype={precision.dtype!r}: one of {', '.join(PARAMETER_DTYPE)}")
    return PARAMETER_DTYPE[precision.dtype]


def _fp8_fields(precision: PrecisionConfig) -> dict[str, Any]:
    if precision.fp8 == "none":
        return {}
    if precision.fp8 not in FP8_RECIPES:
        raise ValueError(f"precision.fp8={precision.fp8!r}: one of none, {', '.join(FP8_RECIPES)}")
    if precision.dtype != "bf16":
        raise ValueError(f"precision.fp8={precision.fp8} needs precision.dtype=bf16, which is {precision.dtype}")
    if not use_gpu():
        raise ValueError(f"precision.fp8={precision.fp8} needs a GPU and Transformer Engine: set precision.fp8=none")
    first, last = bf16_layers(precision)
    return {
        "fp8": "hybrid",
        "fp8_recipe": precision.fp8,
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
        **FP8_RECIPES[precision.fp8],
    }


def _check_layout(model: ModelConfig, parallel: ParallelConfig) -> None:
    tensor, chunks = parallel.tensor, parallel.pipeline * parallel.virtual_pipeline
    if model.num_attention_heads % tensor:
        raise ValueError(
            f"parallel.tensor={tensor} does not divide model.num_attention_heads={model.num_attention_heads}"
        )
    groups = model.num_query_groups
    if model.num_attention_heads % groups:
        raise ValueError(
            f"model.num_query_groups={groups} does not divide model.num_attention_heads={model.num_attention_heads}"
        )
    if groups % tensor and tensor % groups:
        raise ValueError(
            f"parallel.tensor={tensor} neither divides model.num_query_groups={groups} nor is its multiple"
        )
    if model.ffn_hidden_size % tensor:
        raise ValueError(f"parallel.tensor={tensor} does not divide model.ffn_hidden_size={model.ffn_hidden_size}")
    if model.num_layers % chunks:
        raise ValueError(
            f"model.num_layers={model.num_layers} is not a multiple of parallel.pipeline x parallel.virtual_pipeline"
            f"={chunks}"
        )


def _left_unset(weight: Tensor) -> Tensor:
    return weight
