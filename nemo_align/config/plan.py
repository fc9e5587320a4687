"""Schema of the `plan` verb: its own keys, and the stage or the recipe that it looks at."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_align.config.stages import TrainStageConfig


@dataclass(kw_only=True)
class PlanConfig:
    """`nemo-align plan +experiment=... gpus=...`. Every other key is one of the stage's verb."""

    verb: str | None = None  # of the stage: pretrain | sft | reward | preference; null: the experiment's, else pretrain
    gpus: int | None = None  # size of the job; null: the recipe's, or tensor x pipeline x data (data 1 if null)
    lengths: str | None = None  # token lengths of the rows: .npy, a text file with a row per line, or a cache folder
    exact: bool = False  # count the parameters of the real model on the meta device too (imports torch)
    search: bool = False  # rank the layouts of `gpus` that fit by predicted time
    top: int = 10  # layouts that search=true shows
    scaling: bool = False  # the layout on more and more GPUs, with the batch growing (weak) and fixed (strong)
    write_gb_per_second: float | None = None  # of the shared file system; null: by nodes (planning/h100.py)
    json: str | None = None  # file to write the plan to, for machines
    plot: str | None = None  # file to draw scaling=true into (.png, .svg, .pdf; needs the extra `report`)


@dataclass(kw_only=True)
class PlannedStage:
    """What `plan` composes."""

    plan: PlanConfig = field(default_factory=PlanConfig)
    verb: str = "pretrain"  # of the stage
    stage: TrainStageConfig = field(default_factory=TrainStageConfig)  # parallel.data is set
    is_sized: bool = False  # somebody said how many GPUs or replicas
    stand_ins: list[str] = field(default_factory=list)  # keys that nobody gave and that a plan can do without


@dataclass(kw_only=True)
class PlannedRecipe:
    """What `plan` composes of an experiment of `pipeline`: every stage that trains, in order."""

    plan: PlanConfig = field(default_factory=PlanConfig)
    experiment: str = "pipeline"
    stages: dict[str, PlannedStage] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # stages that train nothing
