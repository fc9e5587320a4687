"""Schema of the root config of each verb that runs on workers."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemo_align.config.checkpoint import CheckpointConfig, InitialWeightsConfig
from nemo_align.config.data import (
    PreferenceDataConfig,
    PretrainDataConfig,
    RewardDataConfig,
    ScoreDataConfig,
    SftDataConfig,
)
from nemo_align.config.model import ModelConfig
from nemo_align.config.objectives import PreferenceConfig, RewardConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig, RuntimeConfig
from nemo_align.config.training import OptimizerConfig, PeakConfig, TrackingConfig, TrainConfig


@dataclass(kw_only=True)
class WorkerConfig:
    """What every verb that starts workers has."""

    experiment: str = MISSING  # names the run
    run_dir: str = "runs/${experiment}"  # all of a run; the same command again resumes it
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: InitialWeightsConfig = field(default_factory=InitialWeightsConfig)
    tracking: PeakConfig = field(default_factory=PeakConfig)
    gpus: int | None = None  # size of the job for dry_run, plan and doctor; null: of the one that runs, or parallel.*
    dry_run: bool = False  # check everything, print what the run would do, start nothing; needs no GPU and no data
    dry_run_ranks: list[int] | None = None  # ranks to build; null: one of the first, a middle and the last stage
    dry_run_rows: int | None = None  # training rows to reckon with where the files are not on this machine
    dry_run_strict: bool = False  # refuse also what is only not on this machine: data, tokenizer, checkpoint


@dataclass(kw_only=True)
class TrainStageConfig(WorkerConfig):
    """What every training verb has."""

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass(kw_only=True)
class PretrainStageConfig(TrainStageConfig):
    """`nemo-align pretrain`."""

    data: PretrainDataConfig = field(default_factory=PretrainDataConfig)


@dataclass(kw_only=True)
class SftStageConfig(TrainStageConfig):
    """`nemo-align sft`."""

    data: SftDataConfig = field(default_factory=SftDataConfig)


@dataclass(kw_only=True)
class RewardStageConfig(TrainStageConfig):
    """`nemo-align reward`."""

    data: RewardDataConfig = field(default_factory=RewardDataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(kw_only=True)
class PreferenceStageConfig(TrainStageConfig):
    """`nemo-align preference`."""

    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)


@dataclass(kw_only=True)
class ScoreStageConfig(WorkerConfig):
    """`nemo-align score`: a trained reward model (checkpoint.init_from) writes rewards into rows."""

    data: ScoreDataConfig = field(default_factory=ScoreDataConfig)
    inputs: dict[str, str] = field(default_factory=dict)  # name -> file of rows; <run_dir>/<name>.jsonl is written
    weights: dict[str, float] | None = None  # of the scalar reward; null: those stored with the reward model
    micro_batch_tokens: int | None = None  # null: data.sequence_length
