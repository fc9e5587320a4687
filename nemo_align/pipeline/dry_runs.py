"""Dry runs of the stages of a chain, in one process of their own: this one has no torch."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_align.config.build import missing_keys
from nemo_align.config.compose import ConfigError, to_yaml
from nemo_align.config.job_size import num_nodes
from nemo_align.config.pipeline import ClusterConfig
from nemo_align.pipeline.chain import Stage
from nemo_align.pipeline.leads import Lead
from nemo_align.runtime import signal_lead


def run(
    run_dir: Path, stages: list[Stage], configs: Mapping[str, Any], cluster: ClusterConfig, leads: Mapping[str, Lead]
) -> int:
    """Print what each stage would do; returns 0, or USER_ERROR if any would be refused.

    `leads`: of the stages that SLURM would start.

    Raises:
        ConfigError: a stage whose model nobody knows yet.
    """
    if not stages:
        return 0
    unknown = [stage.name for stage in stages if missing_keys(configs[stage.name])]
    if unknown:
        raise ConfigError(
            f"the model of stage {unknown[0]} is that of a checkpoint that is not on this machine: name it for the dry "
            f"run, 'stages.{unknown[0]}.overrides=[model=<name>]'"
        )
    with tempfile.TemporaryDirectory(prefix="nemo_align_dry_run_") as folder:
        arguments = [str(run_dir)]
        for stage in stages:
            if cluster.kind == "slurm":
                nodes, tasks = num_nodes(cluster, configs[stage.name].parallel)
                configs[stage.name].gpus = nodes * tasks
            path = Path(folder) / f"{stage.name}.yaml"
            path.write_text(to_yaml(configs[stage.name]), encoding="utf-8")
            lead = leads[stage.name].seconds if stage.name in leads else signal_lead.configured()
            arguments += [stage.verb, str(path), str(lead)]
        sys.stdout.flush()
        return subprocess.run([sys.executable, "-m", "nemo_align.dry_run", *arguments], check=False).returncode
