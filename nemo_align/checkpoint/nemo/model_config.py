"""model_config.yaml of a `.nemo` -> our ModelConfig.

What decides the architecture is mapped or must have the one value that Nemotron-4 has; what only concerned training
there is known and left out; any other key is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from nemo_align.config.model import ModelConfig
from nemo_align.config.validation_model import check_model

CONFIG_FILE = "model_config.yaml"
_LONGEST = 1 << 16  # bytes; published ones have some thousand
_DEEPEST = 50  # levels; published ones have 2
_MISSING = object()

# Ours <- theirs.
_SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
}
# What the architecture fixes: key -> the values that mean it. None among them: the key may be absent.
_FIXED: dict[str, tuple] = {
    "activation": ("squared-relu",),
    "normalization": ("layernorm1p",),
    "position_embedding_type": ("rope",),
    "share_embeddings_and_output_weights": (False,),
    "bias": (False,),
    "transformer_block_type": ("pre_ln", None),
    "mcore_gpt": (True, None),
    "headscale": (False, None),
    "openai_gelu": (False, None),
    "onnx_safe": (False, None),
    "attention_type": ("multihead", None),
    "rotary_interleaved": (False, None),
    "seq_len_interpolation_factor": (None,),
    "window_size": (None,),
    "num_moe_experts": (None,),
    "multi_query_attention": (False, None),
    "qk_layernorm": (False, None),
    "scale_positional_embedding": (False, None),
    "normalize_attention_scores": (True, None),
    "use_emha": (False, None),
    "use_avg_pool": (False, None),
}
# Of training, launching and numerics there; none of them changes what the weights mean.
_NAMES_OF_TRAINING = """
activations_checkpoint_granularity activations_checkpoint_layers_per_pipeline activations_checkpoint_method
activations_checkpoint_num_layers answer_only_loss apex_transformer_log_level apply_query_key_layer_scaling
apply_rope_fusion async_grad_allreduce attention_dropout barrier_with_L1_time batch_p2p_comm bert_binary_head
bias_activation_fusion bias_dropout_add_fusion bias_dropout_fusion context_parallel_size cpu_offloading
cross_entropy_loss_fusion data deterministic_mode dist_ckpt_assume_constant_structure dist_ckpt_format
dist_ckpt_load_on_device dist_ckpt_load_strictness dist_ckpt_parallel_dist_opt dist_ckpt_parallel_load
dist_ckpt_parallel_save dist_ckpt_parallel_save_within_dp dist_ckpt_torch_dist_multiproc do_layer_norm_weight_decay
dpo enable_nge encoder_seq_length end_strings ffn_dropout force_head_dtype forward_micro_batch_size
fp16_lm_cross_entropy fp32_residual_connection fp8 fp8_amax_compute_algo fp8_amax_history_len
fp8_dot_product_attention fp8_e4m3 fp8_hybrid fp8_interval fp8_margin fp8_multi_head_attention fp8_params fp8_wgrad
gc_interval gen_shape get_attention_mask_from_fusion global_batch_size grad_allreduce_chunk_size_mb
grad_div_ar_fusion gradient_accumulation_fusion gradient_as_bucket_view hidden_dropout hysteresis inference
init_method_std kv_channels layernorm_epsilon log_reward log_train_loss make_vocab_size_divisible_by
masked_softmax_fusion max_position_embeddings mcore_customization_config megatron_amp_O2 megatron_lm_compatible
merges_file micro_batch_size min_length model_type name native_amp_growth_interval native_amp_init_scale
nccl_communicator_config_path nemo_version nsys_profile num_query_groups
num_sanity_val_steps optim optimizer output_sequence overlap_p2p_comm param_sync_func peft persist_layer_norm
pipeline_model_parallel_size pipeline_model_parallel_split_rank post_process pp_wrapping_layers_partition_method
pre_process precision rampup_batch_size reduce_amax regression reinforce reset_lr reset_lr_steps restore_from_path
resume_from_checkpoint reward_model_type rlhf rotary_base rotary_percentage rs sample_weight
save_nemo_on_validation_end seed sequence_parallel sft sharp spec steerlm swap_in_wait target
tensor_model_parallel_size tokenizer tp_comm_atomic_ag tp_comm_atomic_rs tp_comm_overlap_ag
tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_comm_overlap_rs tp_only_amax_red transformer_engine
ub_tp_comm_overlap use_cpu_initialization use_distributed_checkpointing use_flash_attention
use_scaled_init_method use_te_rng_tracker virtual_pipeline_model_parallel_size wandb weight_decay
"""
_OF_TRAINING = frozenset(_NAMES_OF_TRAINING.split()) | set(_SIZES.values())


def parse(content: bytes, where: str) -> dict:
    """The mapping in a model_config.yaml; `where` is named in errors. Plain YAML: tags and aliases are refused.

    Raises:
        ValueError: too long, not YAML, not a mapping, or with tags or aliases.
    """
    if len(content) > _LONGEST:
        raise ValueError(f"{where} has {len(content):,} bytes, at most {_LONGEST:,} are read")
    depth = 0
    try:
        for event in yaml.parse(content, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:  # the parser's time grows with the square
                raise yaml.YAMLError(f"line {event.start_mark.line + 1} is nested more than {_DEEPEST} levels deep")
            if isinstance(event, yaml.AliasEvent):  # a few of them in each other make billions
                raise yaml.YAMLError(f"line {event.start_mark.line + 1} has an alias, which is not read")
            if getattr(event, "tag", None) is not None:
                raise yaml.YAMLError(f"line {event.start_mark.line + 1} has the tag {event.tag}, which is not read")
        values = yaml.safe_load(content)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # ValueError: a date without a month
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} is not plain YAML: {reason}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{where} holds {type(values).__name__}, not a table of names")
    return values


def model_config(values: Mapping[str, Any], where: str, *, name: str, vocab_size: int) -> ModelConfig:
    """The architecture that a model_config.yaml describes.

    Args:
        vocab_size: tokens; it stands in the tokenizer and the embedding, not in this file.

    Raises:
        ValueError: a size that is missing or no number, or a variant that Nemotron-4 does not have (named).
    """
    for key, allowed in _FIXED.items():
        found = values.get(key, None if None in allowed else _MISSING)
        if found is _MISSING:
            raise ValueError(f"{where} lacks {key}: {allowed[0]!r} is what the Nemotron-4 architecture has")
        if not any(found is value or (type(found) is type(value) and found == value) for value in allowed):
            raise ValueError(f"{where}: {key} is {found!r}, the Nemotron-4 architecture has {allowed[0]!r}")
    heads = _number(values, "num_attention_heads", where, int)
    groups = heads if values.get("num_query_groups") is None else _number(values, "num_query_groups", where, int)
    lengths = [key for key in ("max_position_embeddings", "encoder_seq_length") if values.get(key) is not None]
    if not lengths:
        raise ValueError(f"{where} lacks max_position_embeddings")
    head_size = values.get("kv_channels")
    config = ModelConfig(
        name=name,
        **{ours: _number(values, theirs, where, int) for ours, theirs in _SIZES.items()},
        num_query_groups=groups,
        head_dim=None if head_size is None else _number(values, "kv_channels", where, int),
        vocab_size=vocab_size,
        make_vocab_size_divisible_by=_number(values, "make_vocab_size_divisible_by", where, int, 128),
        max_sequence_length=_number(values, lengths[0], where, int),
        rotary_percent=float(_number(values, "rotary_percentage", where, float)),
        rotary_base=_number(values, "rotary_base", where, int, 10000),
        layernorm_epsilon=float(_number(values, "layernorm_epsilon", where, float)),
        init_std=float(_number(values, "init_method_std", where, float)),
    )
    if problems := list(check_model(config)):
        raise ValueError(f"{where} describes no model: {'; '.join(problems)}")
    return config


def unknown_keys(values: Mapping[str, Any]) -> list[str]:
    """Keys that neither describe the architecture nor are known to be of training."""
    return sorted(key for key in values if key not in _FIXED and key not in _OF_TRAINING)


def _number(values: Mapping[str, Any], key: str, where: str, kind: type, default: float | None = None) -> Any:
    value = values.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f"{where} lacks {key}")
    if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{where}: {key} is {value!r}, a number expected") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
        raise ValueError(f"{where}: {key} is {value!r}, a positive number expected")
    if kind is int:
        if value != int(value):
            raise ValueError(f"{where}: {key} is {value!r}, a whole number expected")
        return int(value)
    return value
