"""DistributedDataParallel, AdamW and the learning-rate schedule, all Megatron-core's, from our config."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.config.training import OptimizerConfig
from nemo_align.runtime.device import use_gpu
from nemo_align.training.schedule_length import ScheduleLength

# Our names of schedules and Megatron-core's.
DECAY_STYLES = {"constant": "constant", "cosine": "cosine", "linear": "linear", "wsd": "WSD"}


def wrap_data_parallel(
    model_chunks: list[torch.nn.Module], parallel: ParallelConfig, precision: PrecisionConfig
) -> list[DistributedDataParallel]:
    """Wrap every model chunk for data parallelism and hook gradient finalisation into its config.

    Gradients are summed, not averaged, over data-parallel ranks: the schedule divides them by the step's global count
    (`calculate_per_token_loss`), so that the update does not depend on how examples are spread over ranks.
    """
    config = get_model_config(model_chunks[0])
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=precision.grad_reduce_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
        # With overlap off one bucket is cheapest; with it, Megatron's default sizes follow the data-parallel size.
        bucket_size=None,
        average_in_collective=False,
    )
    wrapped = [
        DistributedDataParallel(
            config,
            ddp_config,
            chunk,
            # Only the first chunk's buckets can overlap with the rest of the backward pass, so the others take one
            # group. Not on gloo: that group's collectives are coalesced, and torch's coalescing there corrupts buffers
            # of two number formats (a bf16 decoder and its fp32 reward head).
            disable_bucketing=index > 0 and parallel.overlap_grad_reduce and use_gpu(),
        )
        for index, chunk in enumerate(model_chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        grad_sync = [chunk.start_grad_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
        config.grad_sync_func = grad_sync if len(wrapped) > 1 else grad_sync[0]
    if parallel.overlap_param_gather:
        param_sync = [chunk.start_param_sync for chunk in wrapped]
        config.param_sync_func = param_sync if len(wrapped) > 1 else param_sync[0]
    return wrapped


def build_optimizer(
    model_chunks: list[DistributedDataParallel],
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    length: ScheduleLength,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW (decoupled weight decay on matrices only) and its schedule."""
    bf16 = precision.dtype == "bf16"
    config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    megatron_optimizer = get_megatron_optimizer(config, model_chunks)
    return megatron_optimizer, build_scheduler(megatron_optimizer, optimizer, length)


def build_scheduler(
    megatron_optimizer: MegatronOptimizer, optimizer: OptimizerConfig, length: ScheduleLength
) -> OptimizerParamScheduler:
    """Learning rate and weight decay as functions of the examples consumed."""
    return OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=length.warmup,
        lr_decay_steps=max(length.decay, length.warmup + 1),
        lr_decay_style=DECAY_STYLES[optimizer.schedule],
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A resumed run takes position and shape from its own config: the config of a run directory cannot change.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=length.wsd_decay,
        lr_wsd_decay_style="linear",
    )


def gradient_norm(megatron_optimizer: MegatronOptimizer) -> float:
    """Global norm of the step's gradients, which afterwards stand where `apply_gradients` takes them. Collective."""
    megatron_optimizer.prepare_grads()  # its flag is that of a loss scaler, which bf16 and fp32 do without
    return float(megatron_optimizer.get_grad_norm())


def apply_gradients(megatron_optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clip to `optimizer.clip_grad` and update. Megatron's own `step()` would prepare and measure them once more."""
    for part in getattr(megatron_optimizer, "chained_optimizers", [megatron_optimizer]):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0:
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    megatron_optimizer.step_with_ready_grads()


def learning_rate(megatron_optimizer: MegatronOptimizer) -> float:
    """Learning rate of the last step."""
    return float(megatron_optimizer.param_groups[0]["lr"])
