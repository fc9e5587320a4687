"""Transformer Engine's userbuffers: tensor-parallel communication in pieces, beside the products that need it.

They are made once per process, before its layers, for one size of micro-batch, and every pass of the run, forward-only
ones too, has it: on a GPU all micro-batches of a stage are equally long. Never run on several GPUs yet.
"""

from __future__ import annotations

import logging

from nemo_align.config.stages import TrainStageConfig, WorkerConfig
from nemo_align.model.counts import bf16_layers
from nemo_align.runtime.device import use_gpu
from nemo_align.training.step_layout import micro_batch_capacity, padded

logger = logging.getLogger("nemo_align")

_BOOTSTRAP = "nccl"  # of the groups in which ranks tell each other where their buffers are


def start(config: WorkerConfig) -> None:
    """Make the buffers if the layout wants them and this is a GPU. Before the model is built; collective over all ranks
    of the job."""
    parallel, precision = config.parallel, config.precision
    if not parallel.overlap_tensor:
        return
    if not use_gpu():
        logger.info("parallel.overlap_tensor=true changes nothing without a GPU")
        return
    from transformer_engine.pytorch.module import base

    rows = config.train.micro_batch_size if isinstance(config, TrainStageConfig) else 1
    tokens = rows * padded(micro_batch_capacity(config), parallel, precision)
    mode = base.UserBufferQuantizationMode
    modes = [mode.NONE] if precision.fp8 == "none" else [mode.FP8]
    if precision.fp8 == "delayed" or (precision.fp8 != "none" and sum(bf16_layers(precision))):
        modes.append(mode.NONE)  # the delayed recipe rests in passes without gradients
    base.initialize_ub(
        shape=[tokens, config.model.hidden_size],
        tp_size=parallel.tensor,
        quantization_modes=modes,
        ub_cfgs={},
        bootstrap_backend=_BOOTSTRAP,
    )
