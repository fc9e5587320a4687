"""How long before its time limit SLURM tells the job of each stage to stop: what the site says, or what the plan says
that the stage needs to save."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_align.config.build import missing_keys
from nemo_align.config.errors import ConfigError
from nemo_align.config.job_size import nodes_of_stages
from nemo_align.config.pipeline import ClusterConfig
from nemo_align.config.plan import PlannedStage
from nemo_align.config.stages import TrainStageConfig
from nemo_align.config.validation_pipeline import only_starts_and_stops
from nemo_align.pipeline.chain import Stage
from nemo_align.planning.plan import plan_layout
from nemo_align.planning.result import PlanResult
from nemo_align.runtime.signal_lead import DEFAULT_SECONDS


@dataclass(frozen=True)
class Lead:
    """Of one stage."""

    seconds: int  # for sbatch --signal
    plan: PlanResult | None  # None: the stage saves nothing, its model is not known yet, or its nodes are no H100s

    @property
    def is_short(self) -> bool:
        """Whether the plan says that the stage needs more."""
        return self.plan is not None and self.plan.signal_lead_seconds > self.seconds


def leads(stages: list[Stage], configs: Mapping[str, Any], cluster: ClusterConfig) -> dict[str, Lead]:
    """The lead of every stage.

    Raises:
        ValueError: a layout that does not fill whole nodes; leads that do not fit into cluster.time_limit.
    """
    nodes = nodes_of_stages(cluster, {stage.name: configs[stage.name].parallel for stage in stages})
    found: dict[str, Lead] = {}
    problems: dict[str, list[str]] = {}
    for stage in stages:
        plan = _plan(stage, configs[stage.name], cluster, math.prod(nodes[stage.name]))
        lead = cluster.signal_lead_seconds
        if lead is None:
            lead = max(DEFAULT_SECONDS, plan.signal_lead_seconds if plan is not None else 0)
            if cluster.time_limit is not None and only_starts_and_stops(lead, cluster.time_limit):
                problems[stage.name] = [
                    f"the job has to be told to stop {lead} s before its time limit, but with "
                    f"cluster.time_limit={cluster.time_limit} it would then only start and stop: raise the limit, or "
                    "say in cluster.signal_lead_seconds what is enough"
                ]
        found[stage.name] = Lead(lead, plan)
    if problems:
        raise ConfigError.of_stages(problems, len(stages))
    return found


def warning(found: Mapping[str, Lead]) -> str | None:
    """Stages whose saves need more than the lead that was configured, by the plan; None if all is well."""
    short = {name: lead.plan for name, lead in found.items() if lead.is_short and lead.plan is not None}
    if not short:
        return None
    (seconds,) = {found[name].seconds for name in short}
    needs = ", ".join(f"{name} {plan.signal_lead_seconds} s" for name, plan in short.items())
    cost = max((plan.checkpoint for plan in short.values()), key=lambda cost: cost.seconds)
    return (
        f"cluster.signal_lead_seconds={seconds}, but by the plan the saves of these stages need more before a time "
        f"limit: {needs} (a checkpoint of {cost.num_bytes / 1e9:,.0f} GB takes {cost.seconds:.0f} s at "
        f"{cost.bytes_per_second / 1e9:,.1f} GB/s). A job whose last save is cut off goes on from the one before. "
        "Raise it, or leave it null, which takes what the plan says"
    )


def _plan(stage: Stage, config: Any, cluster: ClusterConfig, world_size: int) -> PlanResult | None:
    if not isinstance(config, TrainStageConfig) or missing_keys(config.model) or cluster.gpus_per_node is None:
        return None
    data = world_size // (config.parallel.tensor * config.parallel.pipeline)
    parallel = dataclasses.replace(config.parallel, data=data)
    return plan_layout(PlannedStage(verb=stage.verb, stage=dataclasses.replace(config, parallel=parallel)))
