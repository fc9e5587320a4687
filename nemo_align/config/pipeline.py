"""Schema of the `pipeline` verb and the `cluster` group."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemo_align.config.assignment import assignment


@dataclass(kw_only=True)
class ClusterConfig:
    """Where the stages of a pipeline run."""

    kind: str = "local"  # local | slurm
    nodes: int | None = None  # of stages with parallel.data null; null, and the others: what the layout needs
    gpus_per_node: int | None = 8  # GPUs, and tasks, of a node; null: a cluster without GPUs
    tasks_per_node: int | None = None  # workers on a node; null: gpus_per_node
    partition: str | None = None  # sbatch --partition
    account: str | None = None  # sbatch --account
    qos: str | None = None  # sbatch --qos
    time_limit: str | None = None  # HH:MM:SS
    signal_lead_seconds: int | None = None  # from SIGTERM to the time limit, to save in; null: the plan's, 600 or more
    sbatch_options: list[str] = field(default_factory=list)  # further ones, as --exclude=dgx07 or --reservation=big
    python: str | None = None  # of the environment on the nodes; null: this one, in a container its own `python`
    container_image: str | None = None  # srun --container-image (pyxis): name or .sqsh file; null: no container
    container_mounts: list[str] = field(default_factory=list)  # source:target, besides the folder of the submission


@dataclass(kw_only=True)
class PipelineStageConfig:
    """One stage of the chain. `{name}` in init_from and overrides stands for the run directory of stage `name`."""

    verb: str = MISSING  # pretrain | sft | reward | preference | score
    experiment: str | None = None  # conf/experiment/<experiment>.yaml
    init_from: str | None = None  # name of an earlier stage; null: as the experiment says
    overrides: list[str] = field(default_factory=list)  # Hydra overrides, after the experiment


@dataclass(kw_only=True)
class RecipeDataConfig:
    """What the data of all stages has in common."""

    root: str | None = None  # data.root of every stage whose own overrides name none; null: as the experiments say


@dataclass(kw_only=True)
class PipelineConfig:
    """The chain. Each stage runs in processes of its own, in <run_dir>/<stage name>."""

    experiment: str = "pipeline"  # names the run; +experiment= sets it
    run_dir: str = "runs/${experiment}"  # manifest, report and a folder per stage
    stages: dict[str, PipelineStageConfig] = field(default_factory=dict)  # in order
    data: RecipeDataConfig = field(default_factory=RecipeDataConfig)
    overrides: list[str] = field(default_factory=list)  # for every stage, before its own
    dry_run: bool = False  # dry-run all stages and print their commands, start nothing
    dry_run_strict: bool = False  # refuse also what is only not on this machine: data, tokenizer, checkpoint
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def overrides_of(config: PipelineConfig, stage: PipelineStageConfig) -> list[str]:
    """The overrides of a stage, in order: of every stage, data.root, its own."""
    root = [] if config.data.root is None else [assignment("data.root", config.data.root)]
    return [*config.overrides, *root, *stage.overrides]
