"""A recipe as a list of stages, each with the arguments of its command; all of them checked before the first starts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_align.config import sources, validation
from nemo_align.config.assignment import assignment
from nemo_align.config.build import missing_keys
from nemo_align.config.compose import ConfigError, compose
from nemo_align.config.initial_model import InitialCheckpoint
from nemo_align.config.pipeline import PipelineConfig, PipelineStageConfig, overrides_of
from nemo_align.config.validation_data import missing_files, say_all_missing

_REFERENCE = re.compile(r"\{([A-Za-z0-9][\w.-]*)\}")
_SPECIAL = re.compile(r"([\\()\[\]{}:=, \t])")

# What a stage may start from. A reward model has lost the output projection that a policy needs.
_STARTS_FROM = {
    "pretrain": ("pretrain", "sft", "preference"),
    "sft": ("pretrain", "sft", "preference"),
    "reward": ("pretrain", "sft", "preference", "reward"),
    "preference": ("pretrain", "sft", "preference"),
    "score": ("reward",),
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the chain: `nemo-align <verb> <arguments>`."""

    name: str
    verb: str
    run_dir: Path
    arguments: tuple[str, ...]
    init_from: str | None  # earlier stage that the weights come from
    depends_on: tuple[str, ...]  # earlier stages whose checkpoint or files it reads, in their order


def build_chain(config: PipelineConfig) -> list[Stage]:
    """The stages of a recipe in order. Raises ConfigError for a reference that no earlier stage answers."""
    stages: list[Stage] = []
    for name, entry in config.stages.items():
        earlier = {stage.name: stage for stage in stages}
        stages.append(_stage(name, entry, config, earlier))
    return stages


def _stage(name: str, entry: PipelineStageConfig, config: PipelineConfig, earlier: Mapping[str, Stage]) -> Stage:
    run_dir = Path(config.run_dir) / name
    used: set[str] = set()

    def fill(text: str) -> str:
        def run_dir_of(match: re.Match) -> str:
            if match[1] not in earlier:
                known = ", ".join(earlier) or "none"
                raise ConfigError(f"stages.{name}: {{{match[1]}}} in {text!r} is no earlier stage (earlier: {known})")
            used.add(match[1])
            folder = str(earlier[match[1]].run_dir)
            return folder if _is_quoted(text) else _SPECIAL.sub(r"\\\1", folder)

        return _REFERENCE.sub(run_dir_of, text)

    arguments = [f"+experiment={entry.experiment}"] if entry.experiment else []
    arguments += [fill(text) for text in overrides_of(config, entry)]
    if entry.init_from is not None:
        if entry.init_from not in earlier:
            raise ConfigError(f"stages.{name}.init_from is '{entry.init_from}', which is no earlier stage")
        source = earlier[entry.init_from]
        if source.verb not in _STARTS_FROM[entry.verb]:
            raise ConfigError(
                f"stages.{name}.init_from is '{source.name}', a {source.verb} stage; "
                f"{entry.verb} starts from {' or '.join(_STARTS_FROM[entry.verb])}"
            )
        used.add(source.name)
        arguments.append(assignment("checkpoint.init_from", str(source.run_dir)))
    if entry.experiment is None and name not in sources.choices(sources.EXPERIMENT):
        arguments.append(assignment("experiment", name))
    arguments.append(assignment("run_dir", str(run_dir)))
    return Stage(
        name=name,
        verb=entry.verb,
        run_dir=run_dir,
        arguments=tuple(arguments),
        init_from=entry.init_from,
        depends_on=tuple(stage for stage in earlier if stage in used),
    )


def compose_chain(stages: list[Stage], finished: set[str], *, check_files: bool = True) -> dict[str, Any]:
    """The configuration of every stage, so that a mistake in the last is found before the first starts.

    `finished`: stages whose output is there. What the others will write is taken as given; everything else, files and
    layouts included, is checked as if the stage started now: its model is that of the stage it starts from.
    `check_files=False` takes all files as given: a dry run names those that are not there.

    Raises:
        ConfigError: what is wrong with all stages, each line with the stages that it is wrong with.
    """
    configs: dict[str, Any] = {}
    problems: dict[str, list[str]] = {}
    for stage in stages:
        ready = all(name in finished for name in stage.depends_on)
        try:
            if ready:
                config = compose(stage.verb, stage.arguments, check_files=check_files)
            else:
                config = _compose_early(stage, finished)
                _complete_from_earlier(config, stage, configs)
                if check_files:
                    problems[stage.name] = list(_missing_files(config, stage, stages))
        except ConfigError as error:
            problems[stage.name] = str(error).splitlines()
            continue
        configs[stage.name] = config
    for stage in stages:
        problems.setdefault(stage.name, []).extend(_unwritten_rows(stage, stages, configs))
    if any(problems.values()):
        raise ConfigError.of_stages(problems, len(stages), most=20)
    return configs


def _compose_early(stage: Stage, finished: set[str]) -> Any:
    """The configuration of a stage whose input is not there yet.

    The folder of the stage that it starts from may exist without a checkpoint, or with one that is not its last: it
    must not be read, so a path that never exists stands in for it meanwhile.
    """
    if stage.init_from is None or stage.init_from in finished:
        return compose(stage.verb, stage.arguments, check_files=False)
    to_come = str(stage.run_dir / "awaits" / stage.init_from)
    config = compose(stage.verb, [*stage.arguments, assignment("checkpoint.init_from", to_come)], check_files=False)
    config.checkpoint.init_from = str(stage.run_dir.parent / stage.init_from)
    return config


def _complete_from_earlier(config: Any, stage: Stage, configs: Mapping[str, Any]) -> None:
    """Give the stage the model of the stage it starts from, as its checkpoint will, and check the two together."""
    if stage.init_from is None or stage.init_from not in configs:
        return  # it starts from a checkpoint that is there, or the earlier stage's own problem is reported already
    source = configs[stage.init_from]
    if missing_keys(source.model):
        return
    model = dataclasses.asdict(source.model)
    reward = dataclasses.asdict(source.reward) if hasattr(source, "reward") else None
    initial = InitialCheckpoint("megatron", Path(config.checkpoint.init_from), model, reward, source.data.tokenizer)
    required = {field.name for field in dataclasses.fields(source.model) if field.default == "???"}
    chosen = {key: getattr(config.model, key) for key in required}
    initial.refuse_conflicts({key: value for key, value in chosen.items() if value != "???"})
    for key in required - {key for key, value in chosen.items() if value != "???"}:
        setattr(config.model, key, model[key])
    for key in set(model) - required:
        if getattr(config.model, key) == getattr(type(source.model), key):  # left at its default
            setattr(config.model, key, model[key])
    tokenizer = config.data.tokenizer
    config.data.tokenizer = tokenizer or initial.tokenizer
    validation.complete(config, initial)
    validation.validate(config, check_files=False, awaits_checkpoint=config.data.tokenizer is None, initial=initial)


def _missing_files(config: Any, stage: Stage, stages: list[Stage]) -> Iterator[str]:
    """Files that are not there and that no stage will write."""
    folders = [other.run_dir for other in stages if other.name != stage.name]
    missing = [
        file for file in missing_files(config) if not any(Path(file.path).is_relative_to(folder) for folder in folders)
    ]
    yield from say_all_missing(config, missing)


def _unwritten_rows(stage: Stage, stages: list[Stage], configs: Mapping[str, Any]) -> Iterator[str]:
    """Rows expected from a score stage that it will not write: it writes <run_dir>/<name>.jsonl for each input."""
    if stage.name not in configs:
        return
    for key, path in _paths(configs[stage.name]):
        for other in stages:
            if other.verb == "score" and other.name in configs and path.parent == other.run_dir:
                written = [f"{name}.jsonl" for name in configs[other.name].inputs]
                if path.name not in written:
                    yield f"{key}={path}, but stage {other.name} writes {', '.join(written)}"


def _paths(config: Any) -> Iterator[tuple[str, Path]]:
    for split in ("train", "validation"):
        for name, entry in getattr(config.data, split, {}).items():
            yield f"data.{split}.{name}.path", Path(entry.path)
    for name, path in getattr(config, "inputs", {}).items():
        yield f"inputs.{name}", Path(path)


def _is_quoted(text: str) -> bool:
    return text.partition("=")[2].startswith(("'", '"'))
