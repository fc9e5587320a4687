"""Checks of the model's sizes and of the parallel layout that has to split them."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_align.config.model import ModelConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig

FP8_MULTIPLE = 16  # both sides of a matrix that Transformer Engine multiplies in FP8


def check_model(model: ModelConfig) -> Iterator[str]:
    """The sizes of the model by themselves."""
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
    wrong = [
        name for name in (*sizes, "make_vocab_size_divisible_by", "max_sequence_length") if getattr(model, name) < 1
    ]
    for name in wrong:
        yield f"model.{name} is {getattr(model, name)}, but must be at least 1"
    if wrong:
        return
    heads = model.num_attention_heads
    if model.head_dim is None and model.hidden_size % heads:
        yield (
            f"model.hidden_size {model.hidden_size} is not divisible by {heads} heads (model.num_attention_heads): "
            f"use {_multiples(model.hidden_size, heads)}, or set model.head_dim"
        )
        return
    if heads % model.num_query_groups:
        yield (
            f"model.num_attention_heads {heads} is not divisible by model.num_query_groups {model.num_query_groups}: "
            "every key/value head serves the same number of query heads"
        )
    head_dim = model.head_dim or model.hidden_size // heads
    if head_dim < 1:
        yield f"model.head_dim is {head_dim}, but must be at least 1"
    if not 0 < model.rotary_percent <= 1:
        yield f"model.rotary_percent is {model.rotary_percent}, but must lie in (0, 1]; Nemotron-4 has 0.5"
    elif (turned := int(head_dim * model.rotary_percent)) % 2 or turned == 0:
        yield (
            f"model.rotary_percent {model.rotary_percent} of head_dim {head_dim} is {turned} dimensions, "
            "but RoPE turns an even number of them"
        )
    for name in ("rotary_base", "layernorm_epsilon", "init_std"):
        if not getattr(model, name) > 0:
            yield f"model.{name} is {getattr(model, name)}, but must be positive"


def check_layout(
    parallel: ParallelConfig, model: ModelConfig | None = None, precision: PrecisionConfig | None = None
) -> Iterator[str]:
    """The layout by itself, or, with a model, whether it splits that model."""
    if model is None:
        yield from _check_sizes(parallel)
    else:
        assert precision is not None
        yield from _check_tensor_split(parallel, model, precision)
        yield from _check_pipeline_split(parallel, model, precision)


def check_precision(precision: PrecisionConfig) -> Iterator[str]:
    """Number formats that go together."""
    if precision.fp8 != "none" and precision.dtype == "fp32":
        yield (
            f"precision.fp8={precision.fp8} needs precision.dtype=bf16: Transformer Engine casts from bf16, "
            "and fp32 activations would cost what FP8 saves"
        )
    for name in ("bf16_first_layers", "bf16_last_layers"):
        number = getattr(precision, name)
        if number is None:
            continue
        if number < 0:
            yield f"precision.{name} is {number}, but must be at least 0"
        elif precision.fp8 == "none":
            yield f"precision.{name}={number} has no effect without FP8: set precision.fp8, or leave it out"
        elif precision.fp8 == "delayed" and number:
            yield (
                f"precision.{name}={number} cannot go with precision.fp8=delayed, whose histories are reduced once for "
                "all layers of a pass: use precision=fp8_tensorwise or fp8_blockwise, or leave it out"
            )


def _check_sizes(parallel: ParallelConfig) -> Iterator[str]:
    for name in ("tensor", "pipeline", "virtual_pipeline", "data", "recompute_layers"):
        value = getattr(parallel, name)
        if value is not None and value < 1:
            yield f"parallel.{name} is {value}, but must be at least 1"
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence=true splits activations over the tensor group, so it needs parallel.tensor > 1"
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} interleaves the stages of a pipeline, "
            "so it needs parallel.pipeline > 1"
        )
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        yield (
            "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true, whose parameters "
            "it gathers, and parallel.overlap_grad_reduce=true"
        )
    if parallel.overlap_tensor and not parallel.sequence:
        yield (
            "parallel.overlap_tensor=true cuts the gathers and scatters of sequence parallelism into pieces, so it "
            "needs parallel.sequence=true"
        )
    if parallel.overlap_p2p and parallel.virtual_pipeline == 1:
        yield (
            "parallel.overlap_p2p=true needs an interleaved schedule, parallel.virtual_pipeline > 1: 1F1B sends and "
            "receives between the passes"
        )


def _check_tensor_split(parallel: ParallelConfig, model: ModelConfig, precision: PrecisionConfig) -> Iterator[str]:
    tensor, heads, groups = parallel.tensor, model.num_attention_heads, model.num_query_groups
    if heads % tensor:
        yield f"model.num_attention_heads {heads} is not divisible by parallel.tensor={tensor}: use {_divisors(heads)}"
    elif groups < 1 or (groups % tensor and tensor % groups):
        yield (
            f"parallel.tensor={tensor} is neither a divisor nor a multiple of model.num_query_groups {groups}: "
            f"use {_divisors(groups)}"
        )
    if model.ffn_hidden_size % tensor:
        yield f"model.ffn_hidden_size {model.ffn_hidden_size} is not divisible by parallel.tensor={tensor}"
    if precision.fp8 != "none":
        for name, size in (("hidden_size", model.hidden_size), ("ffn_hidden_size", model.ffn_hidden_size)):
            if (size // tensor) % FP8_MULTIPLE:
                yield (
                    f"precision.fp8={precision.fp8} multiplies matrices whose sides are multiples of {FP8_MULTIPLE}, "
                    f"but model.{name} {size} / parallel.tensor={tensor} is {size / tensor:g}: use precision=bf16"
                )
    if precision.fp8 == "blockwise" and parallel.overlap_tensor:
        yield (
            "parallel.overlap_tensor=true cannot go with precision.fp8=blockwise: Transformer Engine's userbuffers "
            "carry no blockwise tensors. Use precision=fp8_delayed or fp8_tensorwise"
        )


def _check_pipeline_split(parallel: ParallelConfig, model: ModelConfig, precision: PrecisionConfig) -> Iterator[str]:
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if model.num_layers % chunks:
        layout = f"parallel.pipeline={parallel.pipeline}"
        if parallel.virtual_pipeline > 1:
            layout += f" x parallel.virtual_pipeline={parallel.virtual_pipeline} = {chunks} chunks"
        allowed = _divisors(model.num_layers)
        yield f"model.num_layers {model.num_layers} is not divisible by {layout}: use a product among {allowed}"
        return
    for name in ("bf16_first_layers", "bf16_last_layers"):
        number, most = getattr(precision, name) or 0, model.num_layers // parallel.pipeline
        if number > most:
            yield f"precision.{name} is {number}, but a pipeline stage of this layout has only {most} layers"
    if parallel.recompute in ("full", "block") and parallel.recompute_layers > model.num_layers // chunks:
        yield (
            f"parallel.recompute_layers is {parallel.recompute_layers}, but a model chunk of this layout has only "
            f"{model.num_layers // chunks} layers"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(size) for size in range(1, number + 1) if number % size == 0)


def _multiples(number: int, of: int) -> str:
    """The multiples of `of` around `number`."""
    below = number // of * of
    return " or ".join(str(size) for size in (below, below + of) if size)
