"""Checks of batches, the length of a stage and the optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from nemo_align.config.stages import PreferenceStageConfig, PretrainStageConfig, TrainStageConfig
from nemo_align.config.training import TrainConfig


def _packs(config: TrainStageConfig) -> bool:
    return config.train.packing and not isinstance(config, PretrainStageConfig)


# (key, whether it is set without having an effect, what to do). A value that nothing reads would be believed.
_WITHOUT_EFFECT: tuple[tuple[str, Callable[[TrainStageConfig], bool], str], ...] = (
    (
        "train.micro_batch_tokens",
        lambda c: isinstance(c, PretrainStageConfig) and c.train.micro_batch_tokens is not None,
        "in pretrain, whose samples are equally long: set train.micro_batch_size",
    ),
    (
        "train.micro_batch_tokens",
        lambda c: not isinstance(c, PretrainStageConfig) and not _packs(c) and c.train.micro_batch_tokens is not None,
        "with train.packing=false: set train.micro_batch_size, or train.packing=true",
    ),
    (
        "train.micro_batch_size",
        lambda c: _packs(c) and c.train.micro_batch_size != 1,
        "with train.packing=true: set train.micro_batch_tokens, or train.packing=false",
    ),
    (
        "train.nonfinite_limit",
        lambda c: c.train.nonfinite == "error" and c.train.nonfinite_limit != TrainConfig.nonfinite_limit,
        "with train.nonfinite=error: set train.nonfinite=skip, or leave it out",
    ),
    (
        "optimizer.decay_steps",
        lambda c: c.optimizer.schedule == "constant" and c.optimizer.decay_steps is not None,
        "with optimizer.schedule=constant: choose cosine, linear or wsd",
    ),
    (
        "parallel.recompute_layers",
        lambda c: c.parallel.recompute not in ("full", "block") and c.parallel.recompute_layers != 1,
        "unless parallel.recompute is full or block: set that, or leave it out",
    ),
    (
        "preference.gt_reward_scale",
        lambda c: (
            isinstance(c, PreferenceStageConfig)
            and c.preference.preference_loss in ("dpo", "ipo")
            and c.preference.gt_reward_scale != 1
        ),
        "on dpo and ipo, which do not read rewards: choose preference.preference_loss=rpo_bwd_kl, or leave it out",
    ),
    (
        "preference.sft_average_log_probs",
        lambda c: (
            isinstance(c, PreferenceStageConfig)
            and c.preference.sft_loss_weight == 0
            and c.preference.sft_average_log_probs is not None
        ),
        "with preference.sft_loss_weight=0: set a weight, or leave it out",
    ),
)


def check_effect(config: TrainStageConfig) -> Iterator[str]:
    """Values that would change nothing."""
    for key, is_without, remedy in _WITHOUT_EFFECT:
        if is_without(config):
            section, _, name = key.partition(".")
            value = getattr(getattr(config, section), name)
            yield f"{key}={str(value).lower()} has no effect {remedy}"


def check_train(config: TrainStageConfig) -> Iterator[str]:
    """Batch sizes and the length of the stage."""
    train = config.train
    sizes = ("global_batch_size", "micro_batch_size", "max_steps", "validate_every", "log_every", "micro_batch_tokens")
    sizes += ("nonfinite_limit",)
    wrong = [name for name in sizes if getattr(train, name) is not None and getattr(train, name) < 1]
    for name in wrong:
        yield f"train.{name} is {getattr(train, name)}, but must be at least 1"
    if train.epochs is not None and not 0 < train.epochs < float("inf"):
        yield f"train.epochs is {train.epochs}, but must be positive"
    yield from _check_ramp(config)
    if isinstance(config, PretrainStageConfig):
        if train.epochs is not None:
            yield "train.epochs has no meaning for pretrain: its length is the sum of data.phases.<name>.steps"
    elif train.epochs is None and train.max_steps is None:
        yield "the length of the stage is missing: set train.epochs (passes over the rows) or train.max_steps"
    if not wrong and config.gpus is None and (config.parallel.data or 1) > 0:  # else the job's size says
        yield from check_batches(config, config.parallel.data or 1)
    yield from check_overlap(config)


def check_overlap(config: TrainStageConfig) -> Iterator[str]:
    """Userbuffers are made for one size of micro-batch."""
    if config.parallel.overlap_tensor and not isinstance(config, PretrainStageConfig) and not config.train.packing:
        yield (
            "parallel.overlap_tensor=true needs micro-batches of one size: set train.packing=true, or "
            "parallel.overlap_tensor=false"
        )


def check_batches(config: TrainStageConfig, data: int) -> Iterator[str]:
    """The global batch sizes against micro-batches and `data` data-parallel ranks."""
    train, parallel = config.train, config.parallel
    sizes = {"train.global_batch_size": train.global_batch_size}
    sizes |= {
        f"train.batch_ramp[{i}].global_batch_size": entry.global_batch_size for i, entry in enumerate(train.batch_ramp)
    }
    for key, size in sizes.items():
        if isinstance(config, PretrainStageConfig):
            yield from _check_pretrain_batch(
                key, size, train.micro_batch_size, data, parallel.pipeline, parallel.virtual_pipeline
            )
        elif size < data:
            yield (
                f"{key} {size} is less than parallel.data={data}: some ranks would never have an example. "
                f"Use at least {data}, or fewer data-parallel ranks"
            )
    if (
        not isinstance(config, PretrainStageConfig)
        and not train.packing
        and train.micro_batch_size > train.global_batch_size
    ):
        yield (
            f"train.micro_batch_size {train.micro_batch_size} is more than "
            f"train.global_batch_size {train.global_batch_size}"
        )


def check_optimizer(config: TrainStageConfig) -> Iterator[str]:
    """Ranges, and the parts of the schedule against the length of the stage."""
    optimizer = config.optimizer
    if not 0 < optimizer.lr < float("inf"):
        yield f"optimizer.lr is {optimizer.lr}, but must be positive"
    if not 0 <= optimizer.min_lr <= optimizer.lr:
        yield f"optimizer.min_lr is {optimizer.min_lr}, but must lie between 0 and optimizer.lr={optimizer.lr}"
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield f"optimizer.{name} is {getattr(optimizer, name)}, but must lie in [0, 1)"
    if not optimizer.eps > 0:
        yield f"optimizer.eps is {optimizer.eps}, but must be positive"
    for name in ("weight_decay", "clip_grad", "warmup_steps"):
        if not getattr(optimizer, name) >= 0:
            yield f"optimizer.{name} is {getattr(optimizer, name)}, but must not be negative"
    if optimizer.decay_steps is not None and optimizer.decay_steps < 1:
        yield f"optimizer.decay_steps is {optimizer.decay_steps}, but must be at least 1"
    if optimizer.schedule == "wsd" and optimizer.decay_steps is None:
        yield "optimizer.schedule=wsd needs optimizer.decay_steps, the length of the decay that ends the stage"
    yield from _check_schedule_length(config)


def num_steps(config: TrainStageConfig) -> int | None:
    """Steps of the schedule; None where they depend on the number of rows."""
    if isinstance(config, PretrainStageConfig):
        return sum(phase.steps for phase in config.data.phases.values())
    return config.train.max_steps if config.train.epochs is None else None


def _check_schedule_length(config: TrainStageConfig) -> Iterator[str]:
    optimizer, total = config.optimizer, num_steps(config)
    if not total or total < 1:
        return
    if optimizer.warmup_steps >= total:
        yield f"optimizer.warmup_steps {optimizer.warmup_steps} leaves nothing of the stage's {total} steps: lower it"
    elif optimizer.schedule == "wsd" and optimizer.warmup_steps + (optimizer.decay_steps or 0) > total:
        yield (
            f"optimizer.warmup_steps {optimizer.warmup_steps} + optimizer.decay_steps {optimizer.decay_steps} is more "
            f"than the stage's {total} steps"
        )


def _check_ramp(config: TrainStageConfig) -> Iterator[str]:
    ramp = config.train.batch_ramp
    if not ramp:
        return
    if not isinstance(config, PretrainStageConfig):
        yield "train.batch_ramp counts tokens of equally long samples: it is for pretrain only"
        return
    if any(entry.global_batch_size < 1 for entry in ramp):
        yield "train.batch_ramp has a global_batch_size below 1"
    starts = [entry.from_tokens for entry in ramp]
    if starts[0] != 0:
        yield f"train.batch_ramp begins at {starts[0]:g} tokens: its first entry must have from_tokens: 0"
    if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        yield f"train.batch_ramp is not in order: from_tokens are {', '.join(f'{start:g}' for start in starts)}"
    if ramp[-1].global_batch_size != config.train.global_batch_size:
        yield (
            f"train.batch_ramp ends with {ramp[-1].global_batch_size} but train.global_batch_size is "
            f"{config.train.global_batch_size}: they must be the same"
        )


def _check_pretrain_batch(key: str, size: int, micro: int, data: int, pipeline: int, virtual: int) -> Iterator[str]:
    unit, rounds = micro * data, pipeline if virtual > 1 else 1
    below = size // (unit * rounds) * unit * rounds
    nearest = " or ".join(str(good) for good in (below, below + unit * rounds) if good)
    if size % unit:
        yield (
            f"{key} {size} is not divisible by train.micro_batch_size {micro} x parallel.data {data} = {unit}: "
            f"use {nearest}"
        )
    elif (size // unit) % rounds:
        yield (
            f"{key} {size} is {size // unit} micro-batches per data-parallel rank, but the interleaved schedule "
            f"takes a multiple of parallel.pipeline={pipeline}: use {nearest}, or parallel.virtual_pipeline=1"
        )
