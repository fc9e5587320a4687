"""Checks of a chain of stages before the first one starts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nemo_align.config import overrides, sources, suggest
from nemo_align.config.errors import ConfigError
from nemo_align.config.pipeline import ClusterConfig, PipelineConfig
from nemo_align.config.schema import STAGE_VERBS

_REFERENCE = re.compile(r"\{([^{}]*)\}")
_LONGEST_LEAD_SECONDS, _SIGNAL_EARLY_SECONDS = 65535, 60  # of sbatch --signal
_TIME_LIMIT = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}")
_SBATCH_OPTION = re.compile(r"--[a-z][a-z-]*(=\S+)?")
# Options of sbatch that the submission sets itself, and what to do instead.
_OWN_OPTIONS = {
    **{f"--{name}": f"cluster.{name} says it: use that" for name in ("partition", "account", "qos", "nodes")},
    "--time": "cluster.time_limit says it: use that",
    "--signal": "cluster.signal_lead_seconds says it: use that",
    "--gpus-per-node": "cluster.gpus_per_node says it: use that",
    "--ntasks-per-node": "cluster.tasks_per_node says it: use that",
    **{
        f"--{name}": "the pipeline sets it for each stage: leave it out"
        for name in ("dependency", "kill-on-invalid-dep", "job-name", "output", "open-mode", "export", "parsable")
    },
}


def check_pipeline(config: PipelineConfig) -> Iterator[str]:
    """Stage names, verbs, experiments, hand-offs and the keys of all overrides."""
    if not config.stages:
        yield "stages is empty: choose a recipe with +experiment=<recipe>/recipe, or name stages.<name>.verb=..."
    earlier: list[str] = []
    for name, stage in config.stages.items():
        key = f"stages.{name}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            yield f"{key}: the name becomes a folder, so use letters, digits, _, - and ."
        if stage.verb not in STAGE_VERBS:
            guess = suggest.did_you_mean(stage.verb, STAGE_VERBS)
            yield f"{key}.verb is '{stage.verb}', but must be one of {', '.join(STAGE_VERBS)}{guess}"
            earlier.append(name)
            continue
        known = sources.choices(sources.EXPERIMENT)
        if stage.experiment is not None and stage.experiment not in known:
            guess = suggest.did_you_mean(stage.experiment, known)
            yield f"{key}.experiment: unknown experiment '{stage.experiment}'{guess}"
        if stage.init_from is not None and stage.init_from not in earlier:
            known = ", ".join(earlier) or "there is none"
            yield f"{key}.init_from is '{stage.init_from}', which is no earlier stage ({known})"
        yield from _check_overrides(f"{key}.overrides", stage.verb, stage.overrides, earlier)
        earlier.append(name)
    for text in config.overrides:  # for every stage: a key must exist in each of their verbs
        for verb in sorted({stage.verb for stage in config.stages.values() if stage.verb in STAGE_VERBS}):
            yield from _check_overrides("overrides", verb, [text], earlier)
    cluster = config.cluster
    for name in ("nodes", "gpus_per_node", "tasks_per_node"):
        if getattr(cluster, name) is not None and getattr(cluster, name) < 1:
            yield f"cluster.{name} is {getattr(cluster, name)}, but must be at least 1"
    if cluster.kind == "slurm" and cluster.gpus_per_node is None and cluster.tasks_per_node is None:
        yield "cluster.gpus_per_node=null needs cluster.tasks_per_node, the workers on each node"
    yield from _check_container(cluster)
    yield from _check_options(cluster)
    if cluster.time_limit is not None and not _TIME_LIMIT.fullmatch(cluster.time_limit):
        yield (
            f"cluster.time_limit is '{cluster.time_limit}', but must be HH:MM:SS or D-HH:MM:SS; "
            "quote it in YAML, which reads 4:00:00 as a number"
        )
    else:
        yield from _check_lead(cluster)


def _check_lead(cluster: ClusterConfig) -> Iterator[str]:
    lead = cluster.signal_lead_seconds
    if lead is None:
        return
    if not 1 <= lead <= _LONGEST_LEAD_SECONDS:
        yield f"cluster.signal_lead_seconds is {lead}, but SLURM takes 1 .. {_LONGEST_LEAD_SECONDS} (sbatch --signal)"
    elif cluster.time_limit is not None and only_starts_and_stops(lead, cluster.time_limit):
        yield (
            f"cluster.signal_lead_seconds is {lead} and SLURM may send the signal {_SIGNAL_EARLY_SECONDS} s early, so "
            f"within cluster.time_limit={cluster.time_limit} ({seconds_of(cluster.time_limit)} s) a job would only "
            "start and stop: raise the limit, or save in less"
        )


def only_starts_and_stops(lead: int, time_limit: str) -> bool:
    """Whether the signal may come as soon as the job starts."""
    return seconds_of(time_limit) <= lead + _SIGNAL_EARLY_SECONDS


def seconds_of(time_limit: str) -> int:
    """Seconds of HH:MM:SS or D-HH:MM:SS."""
    days, _, clock = time_limit.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _check_options(cluster: ClusterConfig) -> Iterator[str]:
    for index, option in enumerate(cluster.sbatch_options):
        name = option.partition("=")[0]
        if not _SBATCH_OPTION.fullmatch(option):
            yield (
                f"cluster.sbatch_options[{index}] is '{option}', but must be a long option with its value and without "
                "spaces. Example: cluster.sbatch_options=[--exclude=dgx07]"
            )
        elif name in _OWN_OPTIONS:
            yield f"cluster.sbatch_options[{index}] is '{option}', but {_OWN_OPTIONS[name]}"


def _check_container(cluster: ClusterConfig) -> Iterator[str]:
    if cluster.container_mounts and cluster.container_image is None:
        yield "cluster.container_mounts has no effect without cluster.container_image: name the image, or leave it out"
    for index, mount in enumerate(cluster.container_mounts):
        if not re.fullmatch(r"[^\s:,]+:[^\s:,]+(:[^\s:,]+)?", mount):
            yield (
                f"cluster.container_mounts[{index}] is '{mount}', but must be source:target, without spaces or commas: "
                "/lustre:/lustre"
            )
    for name in ("container_image", "python"):
        value = getattr(cluster, name)
        if value is not None and (not value or re.search(r"\s", value)):
            yield f"cluster.{name} is '{value}', but must be a name without spaces"


def _check_overrides(key: str, verb: str, texts: list[str], earlier: list[str]) -> Iterator[str]:
    for text in texts:
        for name in _REFERENCE.findall(text):
            if re.fullmatch(r"[\w.-]+", name) and name not in earlier:
                guess = suggest.did_you_mean(name, earlier)
                yield f"{key}: {{{name}}} in {text!r} is no earlier stage{guess}"
    try:
        overrides.parse(verb, texts, where="written")
    except ConfigError as error:
        yield from (f"{key}: {line}" for line in str(error).splitlines())
