"""Schema of the `pipeline` verb and the `cluster` group."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass(kw_only=True)
class ClusterConfig:
    """Where the stages of a pipeline run."""

    kind: str = "local"  # local | slurm
    nodes: int | None = None
    gpus_per_node: int = 8
    partition: str | None = None
    account: str | None = None
    time_limit: str | None = None  # HH:MM:SS


@dataclass(kw_only=True)
class PipelineStageConfig:
    """One stage of the chain. `{name}` in init_from and overrides stands for the run directory of stage `name`."""

    verb: str = MISSING  # pretrain | sft | reward | preference | score
    experiment: str | None = None  # conf/experiment/<experiment>.yaml
    init_from: str | None = None  # name of an earlier stage; null: as the experiment says
    overrides: list[str] = field(default_factory=list)  # Hydra overrides, after the experiment


@dataclass(kw_only=True)
class PipelineConfig:
    """The chain. Each stage runs in processes of its own, in <run_dir>/<stage name>."""

    experiment: str = "pipeline"
    run_dir: str = "runs/${experiment}"
    stages: dict[str, PipelineStageConfig] = field(default_factory=dict)  # in order
    overrides: list[str] = field(default_factory=list)  # for every stage, before its own
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
