"""Checks across the keys of a composed configuration, each with its remedy; without torch.

Every check yields messages; all of them are shown at once. What depends on the machine is separate: `check_world_size`
and `check_accelerator` are called once processes and GPUs are known.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_align.config import schema, suggest
from nemo_align.config.choices import CHOICES, HELPSTEER2_WEIGHTS
from nemo_align.config.conversion import ConvertConfig, MergeConfig
from nemo_align.config.errors import ConfigError
from nemo_align.config.initial_model import InitialCheckpoint
from nemo_align.config.objectives import RewardConfig
from nemo_align.config.pipeline import PipelineConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.config.stages import (
    PreferenceStageConfig,
    RewardStageConfig,
    ScoreStageConfig,
    TrainStageConfig,
    WorkerConfig,
)
from nemo_align.config.validation_conversion import check_convert, check_merge
from nemo_align.config.validation_data import check_data, check_length
from nemo_align.config.validation_model import check_layout, check_model, check_precision
from nemo_align.config.validation_pipeline import check_pipeline
from nemo_align.config.validation_train import check_batches, check_effect, check_optimizer, check_train

# What the verbs that cannot start from random weights need, and an example.
NEEDS_CHECKPOINT: dict[type, tuple[str, str]] = {
    PreferenceStageConfig: ("the policy to start from, which is also the reference", "runs/sft"),
    ScoreStageConfig: ("the reward model", "runs/reward"),
}


def complete(config: Any, initial: InitialCheckpoint | None, *, model_known: bool = True) -> None:
    """Fill in what follows from other keys, so that the saved configuration shows what is used.

    `model_known`: the sizes of the model are there.
    """
    if isinstance(config, WorkerConfig) and config.data.sequence_length is None and model_known:
        config.data.sequence_length = config.model.max_sequence_length
    if (
        isinstance(config, RewardStageConfig)
        and config.reward.weights is None
        and _is_helpsteer2(config.reward.attributes)
    ):
        config.reward.weights = {name: HELPSTEER2_WEIGHTS[name] for name in config.reward.attributes}
    if isinstance(config, ScoreStageConfig) and config.weights is None and initial and initial.reward:
        config.weights = initial.reward.get("weights")


def validate(
    config: Any,
    *,
    check_files: bool = True,
    model_known: bool = True,
    awaits_checkpoint: bool = False,
    initial: InitialCheckpoint | None = None,
) -> None:
    """Refuse a configuration that cannot run.

    `model_known`: the sizes of the model are there; `awaits_checkpoint`: checkpoint.init_from, which may bring a
    tokenizer, is not there yet; `initial`: what it says if it is.

    Raises:
        ConfigError: every problem, a line each.
    """
    problems = [*_choices(config), *_check_names(config)]
    if isinstance(config, WorkerConfig):
        problems += _check_worker(config, check_files, model_known, awaits_checkpoint, initial)
    elif isinstance(config, PipelineConfig):
        problems += check_pipeline(config)
    elif isinstance(config, ConvertConfig):
        problems += check_convert(config, check_files)
    elif isinstance(config, MergeConfig):
        problems += check_merge(config, check_files)
    if problems:
        raise ConfigError.of(problems)


def check_world_size(parallel: ParallelConfig, world_size: int, *, named: bool = False) -> int:
    """The data-parallel size that `world_size` processes leave. `named`: their number is that of the key gpus.

    Raises:
        ConfigError: the processes do not form the layout.
    """
    cell = parallel.tensor * parallel.pipeline
    layout = f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}"
    size = f"gpus={world_size}" if named else f"{world_size} processes"
    if world_size % cell:
        raise ConfigError(
            f"{size} cannot form {layout}: {'name' if named else 'start'} a multiple of {cell}, or choose a layout "
            f"whose product divides {world_size}"
        )
    data = world_size // cell
    if parallel.data not in (None, data):
        needed = cell * parallel.data
        raise ConfigError(
            f"{size} {'is' if named else 'are'} not {layout} x parallel.data={parallel.data} = {needed}: "
            f"{f'set gpus={needed}' if named else f'start {needed}'}, or set parallel.data={data} (null takes what is "
            "left)"
        )
    return data


def check_data_parallel(config: WorkerConfig, data: int) -> None:
    """Refuse batch sizes that `data` data-parallel ranks cannot share.

    Raises:
        ConfigError: with the sizes that would do.
    """
    if isinstance(config, TrainStageConfig) and (problems := list(check_batches(config, data))):
        raise ConfigError.of(problems)


def check_accelerator(precision: PrecisionConfig, num_gpus: int) -> None:
    """Refuse what only a GPU has on a machine without one.

    Raises:
        ConfigError: with the remedy.
    """
    if precision.fp8 != "none" and num_gpus == 0:
        raise ConfigError(
            f"precision.fp8={precision.fp8} needs a GPU with Transformer Engine and this machine has none: "
            "use precision=bf16 here"
        )
    if precision.attention != "auto" and num_gpus == 0:
        raise ConfigError(
            f"precision.attention={precision.attention} chooses a GPU's kernel and this machine has none: leave it out "
            "here"
        )


def _check_worker(
    config: WorkerConfig,
    check_files: bool,
    model_known: bool,
    awaits_checkpoint: bool,
    initial: InitialCheckpoint | None,
) -> Iterator[str]:
    yield from check_layout(config.parallel)
    yield from check_precision(config.precision)
    if model_known:
        yield from check_model(config.model)
        yield from check_length(config)
        if config.parallel.tensor > 0 and config.parallel.pipeline > 0 and config.parallel.virtual_pipeline > 0:
            yield from check_layout(config.parallel, config.model, config.precision)
    yield from _check_process(config)
    yield from _check_initial(config, awaits_checkpoint, initial)
    yield from _check_dry_run(config)
    yield from check_data(config, check_files)
    if isinstance(config, TrainStageConfig):
        yield from check_train(config)
        yield from check_optimizer(config)
        yield from check_effect(config)
    if isinstance(config, RewardStageConfig):
        yield from _check_reward(config.reward)
    if isinstance(config, PreferenceStageConfig):
        yield from _check_preference(config)
    if isinstance(config, ScoreStageConfig) and initial is not None:
        yield from _check_score_weights(config, initial)


def _check_names(config: Any) -> Iterator[str]:
    """Where the run goes."""
    if not config.run_dir.strip():
        yield "run_dir is empty: name the folder of the run. Example: run_dir=runs/mine"
    name = getattr(config, "experiment", None)
    if name is not None and (not name.strip() or name.startswith("/") or ".." in Path(name).parts):
        yield (
            f"experiment is '{name}', but names the run and its folder below runs/: use a name without .. or a leading "
            "/, and run_dir= for a folder elsewhere"
        )


def missing_checkpoint(cls: type) -> str | None:
    """What to say if checkpoint.init_from is missing; None for verbs that can do without."""
    if cls not in NEEDS_CHECKPOINT:
        return None
    meaning, example = NEEDS_CHECKPOINT[cls]
    return f"checkpoint.init_from is missing: {meaning}. Example: checkpoint.init_from={example}"


def _choices(config: Any) -> Iterator[str]:
    """Keys with few choices."""
    for key, allowed in CHOICES.items():
        value = _select(config, key)
        if value is not None and value not in allowed:
            shown = {"source_format": "from", "target_format": "to"}.get(key, key)
            guess = suggest.did_you_mean(str(value), allowed)
            yield f"{shown} is '{value}', but must be one of {', '.join(allowed)}{guess}"


def _select(config: Any, key: str) -> Any:
    """The value of a dotted key, None where the verb has no such key."""
    if schema.find(type(config), key) is None:
        return None
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _check_process(config: WorkerConfig) -> Iterator[str]:
    runtime, tracking = config.runtime, config.tracking
    if not 0 <= runtime.seed < 2**31:
        yield f"runtime.seed is {runtime.seed}, but must lie in 0 .. 2^31 - 1"
    if not runtime.distributed_timeout_minutes > 0:
        yield f"runtime.distributed_timeout_minutes is {runtime.distributed_timeout_minutes}, but must be positive"
    elif not 0 <= runtime.hang_timeout_minutes < runtime.distributed_timeout_minutes:
        yield (
            f"runtime.hang_timeout_minutes is {runtime.hang_timeout_minutes}, but must lie below "
            f"runtime.distributed_timeout_minutes={runtime.distributed_timeout_minutes}, so that a hang shows its "
            "stacks before the collectives fail (0: no watch)"
        )
    if runtime.max_restarts < 0:
        yield f"runtime.max_restarts is {runtime.max_restarts}, but must not be negative (0: never restart)"
    if runtime.threads is not None and runtime.threads < 1:
        yield f"runtime.threads is {runtime.threads}, but must be at least 1 (null: cores / workers)"
    if isinstance(config, TrainStageConfig):
        checkpoint = config.checkpoint
        if checkpoint.save_every is not None and checkpoint.save_every < 1:
            yield f"checkpoint.save_every is {checkpoint.save_every}, but must be at least 1 (null: only at the end)"
        if checkpoint.keep_last < 1:
            yield f"checkpoint.keep_last is {checkpoint.keep_last}, but at least 1 must stay, to resume from"
    if tracking.peak_tflops is not None and not tracking.peak_tflops > 0:
        yield f"tracking.peak_tflops is {tracking.peak_tflops}, but must be positive (null: datasheet or measured)"


def _check_dry_run(config: WorkerConfig) -> Iterator[str]:
    for name in ("gpus", "dry_run_rows"):
        value = getattr(config, name)
        if value is not None and value < 1:
            yield f"{name} is {value}, but must be at least 1"
    if config.dry_run_ranks is not None and (not config.dry_run_ranks or min(config.dry_run_ranks) < 0):
        yield f"dry_run_ranks is {config.dry_run_ranks}, but must name ranks of the job, from 0 on: dry_run_ranks=[0]"


def _check_initial(config: WorkerConfig, awaits_checkpoint: bool, initial: InitialCheckpoint | None) -> Iterator[str]:
    init_from = config.checkpoint.init_from
    if init_from is None and (message := missing_checkpoint(type(config))):
        yield message
    if isinstance(config, TrainStageConfig) and config.checkpoint.load_optimizer:
        if init_from is None:
            yield "checkpoint.load_optimizer=true needs checkpoint.init_from, whose optimizer state it loads"
        elif initial is not None and initial.kind == "hf":
            yield f"checkpoint.load_optimizer=true, but {initial.path} is a Hugging Face folder and has none"
    if (
        isinstance(config, RewardStageConfig)
        and config.reward.load_head
        and (init_from is None or (initial is not None and initial.reward is None))
    ):
        yield "reward.load_head=true needs checkpoint.init_from to be a reward model's checkpoint"
    if (
        isinstance(config, ScoreStageConfig)
        and initial is not None
        and initial.kind == "megatron"
        and initial.reward is None
    ):
        yield f"checkpoint.init_from={init_from} is not a reward model: name the run directory of a reward stage"
    if config.data.tokenizer is None and not awaits_checkpoint:
        remedy = "a SentencePiece file or a Hugging Face folder. Example: data.tokenizer=data/tokenizer.model"
        yield f"data.tokenizer is missing, and checkpoint.init_from gives none: {remedy}"


def _check_reward(reward: RewardConfig) -> Iterator[str]:
    attributes = reward.attributes
    if not attributes:
        yield "reward.attributes is empty: name at least one column of scores"
    twice = sorted({name for name in attributes if attributes.count(name) > 1})
    if twice:
        yield f"reward.attributes names {', '.join(twice)} twice"
    if reward.weights is None:
        example = ", ".join(f"{name}: 1.0" for name in attributes[:2])
        yield (
            "reward.weights is missing: only HelpSteer2's five attributes have published weights. "
            f"Example: 'reward.weights={{{example}}}'"
        )
    else:
        yield from _check_weights("reward.weights", reward.weights, attributes)
    if reward.head_init_std is not None and not reward.head_init_std >= 0:
        yield f"reward.head_init_std is {reward.head_init_std}, but must not be negative"


def _check_weights(key: str, weights: dict[str, float], attributes: list[str]) -> Iterator[str]:
    for name in weights:
        if name not in attributes:
            guess = suggest.did_you_mean(name, attributes)
            yield f"{key}.{name}: no such attribute{guess} (attributes: {', '.join(attributes)})"
    if lacking := [name for name in attributes if name not in weights]:
        yield f"{key} lacks {', '.join(lacking)}: give every attribute a weight, 0 to leave it out of the scalar reward"


def _check_score_weights(config: ScoreStageConfig, initial: InitialCheckpoint) -> Iterator[str]:
    if initial.reward is None:
        return
    attributes = initial.reward["attributes"]
    if config.weights is None:
        yield f"weights is missing, and the reward model has none: give one to each of {', '.join(attributes)}"
    else:
        yield from _check_weights("weights", config.weights, attributes)


def _check_preference(config: PreferenceStageConfig) -> Iterator[str]:
    preference = config.preference
    if not preference.ref_policy_kl_penalty > 0:
        yield f"preference.ref_policy_kl_penalty (beta) is {preference.ref_policy_kl_penalty}, but must be positive"
    if preference.preference_loss.startswith("rpo") and not preference.gt_reward_scale > 0:
        yield f"preference.gt_reward_scale (eta) is {preference.gt_reward_scale}, but must be positive"
    for name in ("preference_loss_weight", "sft_loss_weight"):
        if not getattr(preference, name) >= 0:
            yield f"preference.{name} is {getattr(preference, name)}, but must not be negative"
    if preference.preference_loss_weight == 0 and preference.sft_loss_weight == 0:
        yield "preference.preference_loss_weight and preference.sft_loss_weight are both 0: nothing would be trained"


def _is_helpsteer2(attributes: list[str]) -> bool:
    return sorted(attributes) == sorted(HELPSTEER2_WEIGHTS)
