"""Schema of the `train`, `optimizer` and `tracking` groups."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass(kw_only=True)
class BatchRampConfig:
    """From that many trained tokens on, this global batch size."""

    from_tokens: float = MISSING  # trained tokens
    global_batch_size: int = MISSING  # from there on


@dataclass(kw_only=True)
class TrainConfig:
    """Batches, length of the stage, validation. Batch sizes count examples: samples, dialogues or pairs."""

    global_batch_size: int = MISSING  # examples per optimizer step: samples, dialogues or pairs
    batch_ramp: list[BatchRampConfig] = field(default_factory=list)  # pretraining only; begins at 0 tokens
    packing: bool = True  # several examples in a micro-batch up to micro_batch_tokens; not for pretraining
    micro_batch_size: int = 1  # examples in a micro-batch when packing is off, and in pretraining
    micro_batch_tokens: int | None = None  # null: data.sequence_length (twice that for pairs)
    epochs: float | None = None  # passes over the training rows; not for pretraining, whose phases have steps
    max_steps: int | None = None  # stop here, whatever the schedule's length
    validate_every: int | None = None  # steps; null: at the start and at the end only
    validate_at_start: bool = True  # also before the first step, to compare with
    log_every: int = 1  # steps between progress lines; metrics.jsonl has every step
    nonfinite: str = "error"  # a loss or gradient that is not finite: error | skip the step
    nonfinite_limit: int = 10  # steps skipped one after another at which the run stops all the same


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and the learning-rate schedule."""

    lr: float = MISSING  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end of the decay
    schedule: str = "constant"  # constant | cosine | linear | wsd
    warmup_steps: int = 0  # linear from 0 to lr
    decay_steps: int | None = None  # cosine, linear: null = the whole stage; wsd: length of the final decay
    weight_decay: float = 0.1  # matrices only
    beta1: float = 0.9  # decay of the first moment
    beta2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    clip_grad: float = 1.0  # global norm; 0 = off


@dataclass(kw_only=True)
class PeakConfig:
    """What MFU is measured against."""

    peak_tflops: float | None = None  # per device, for MFU; null: the datasheet's (GPU) or measured at start (CPU)


@dataclass(kw_only=True)
class TrackingConfig(PeakConfig):
    """Where metrics go besides metrics.jsonl, which is always written."""

    tensorboard: bool = False  # event files in <run_dir>/tensorboard
    wandb: bool = False  # Weights & Biases; WANDB_API_KEY in the environment
    wandb_project: str = "nemo_align"  # project name there
