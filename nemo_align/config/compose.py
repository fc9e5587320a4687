"""Composing: conf/<verb>.yaml, the chosen groups, the experiment and the command line into one typed dataclass.

The dataclasses are the schema and hold all defaults; YAML selects and overrides. Hydra composes the plain tree. Then
every key of it is compared with the dataclasses, whatever file or prefix it came from, every value with its type, and
the whole with the cross-field checks of `validation.py`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_align.config import build, initial_model, overrides, schema, sources, suggest, untrusted, validation
from nemo_align.config.errors import ConfigError
from nemo_align.config.schema import MISSING, VERBS

__all__ = ["VERBS", "ConfigError", "compose", "load_resolved", "to_yaml"]


def compose(
    verb: str,
    arguments: Sequence[str],
    *,
    check_files: bool = True,
    fill: Callable[[dict[str, Any]], None] | None = None,
) -> Any:
    """The configuration of a verb: an instance of VERBS[verb] without unknown keys, interpolations or missing values;
    of `plan`, which has a stage of another verb in it, a `PlannedStage`.

    `arguments`: overrides as on the command line. `check_files=False` leaves out what needs files that an earlier stage
    still has to write: a pipeline uses it to find mistakes in all stages before it starts the first; the model's
    sizes stay "???" if they would come from a checkpoint that is not there yet. A dry run leaves it out too, unless
    dry_run_strict is set: it names what is not there. `fill` may put values into the plain tree, defaults and
    checkpoint applied, before it is checked: a plan gives stand-ins for what only a run needs, and then has to give the
    model too.

    Raises:
        ConfigError: all that is wrong of one kind, each problem a line with key, value and remedy.
    """
    if verb == "plan":
        from nemo_align.config.plan_stage import compose_plan

        return compose_plan(arguments)
    parsed = overrides.parse(verb, arguments)
    composed = _compose_with_hydra(verb, parsed)
    root = schema.Node("section", VERBS[verb])
    unknown = [
        f"{suggest.unknown_key_message(key, verb)} ({composed.origin(key, parsed)})"
        for key in schema.unknown_keys(root, composed.tree)
    ]
    if unknown:
        raise ConfigError.of(unknown)
    tree = composed.tree
    if tree.get("dry_run") is True and tree.get("dry_run_strict") is not True:
        check_files = False
    if "experiment" in schema.fields(VERBS[verb]):
        chosen = [o for o in parsed if o.key == "experiment" and not o.is_group]
        if chosen or tree.get("experiment") is None:
            tree["experiment"] = overrides.experiment_name(parsed) or verb
    _settle_size(tree, parsed)
    initial, resolved = _resolve(verb, tree, check_files)
    if fill is not None:
        fill(resolved)
    config, problems = build.build(VERBS[verb], resolved)
    if problems:
        raise ConfigError.of(f"{line} ({composed.origin(line.split(' ')[0], parsed)})" for line in problems)
    awaits_checkpoint = initial is None and not check_files and fill is None and _init_from(tree) is not None
    _refuse_missing(verb, config, awaits_checkpoint, parsed)
    model_known = not (awaits_checkpoint and build.missing_keys(config.model))
    validation.complete(config, initial, model_known=model_known)
    validation.validate(
        config, check_files=check_files, model_known=model_known, awaits_checkpoint=awaits_checkpoint, initial=initial
    )
    return config


def _settle_size(tree: dict[str, Any], parsed: Sequence[overrides.Override]) -> None:
    """Of gpus and parallel.data the one of the command line decides: the other, of a recipe, was made for another size.
    Where both are given they have to agree (config/job_size.py)."""
    given = {override.key for override in parsed if not override.is_group and override.prefix != "~"}
    parallel = tree.get("parallel", {})
    if "gpus" in given and tree["gpus"] is not None and "parallel.data" not in given:
        parallel.pop("data", None)
    elif "parallel.data" in given and parallel["data"] is not None and "gpus" not in given:
        tree.pop("gpus", None)


def to_yaml(config: Any, part: str | None = None) -> str:
    """A typed configuration as YAML, every key written out; or the part of it below a dotted key.

    Raises:
        ConfigError: no such part.
    """
    from omegaconf import OmegaConf

    node = OmegaConf.structured(config)
    if part is not None:
        if schema.find(type(config), part) is None:
            raise ConfigError(f"no such part: '{part}'")
        node = OmegaConf.select(node, part)
    return OmegaConf.to_yaml(node) if OmegaConf.is_config(node) else f"{node}\n"


def load_resolved(verb: str, path: Path | str) -> Any:
    """The configuration that `to_yaml` wrote, for workers: strict about keys and types, without Hydra.

    Raises:
        ConfigError: unreadable, an unknown or missing key, or a value of the wrong type; with the file's name.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        # Everything was resolved before it was written: what looks like an interpolation here is text.
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read: {_first_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds no configuration")
    unknown = list(schema.unknown_keys(schema.Node("section", VERBS[verb]), tree))
    if unknown:
        raise ConfigError.of(f"{path}: {suggest.unknown_key_message(key, verb)}" for key in unknown)
    config, problems = build.build(VERBS[verb], tree)
    problems = problems or [build.missing_message(VERBS[verb], key) for key in build.missing_keys(config)]
    if problems:
        raise ConfigError.of(f"{path}: {problem}" for problem in problems)
    return config


@dataclass(frozen=True)
class _Composed:
    """What Hydra made: the plain tree and the files that it merged."""

    tree: dict[str, Any]
    files: list[tuple[str, str]]  # (path without .yaml, package)

    def origin(self, key: str, parsed: Sequence[overrides.Override]) -> str:
        """Where a key of the tree was set, for messages."""
        plain = key.split("[")[0]
        for override in reversed(parsed):
            if not override.is_group and (plain == override.key or plain.startswith(f"{override.key}.")):
                return f"command line: {override.text}"
        return sources.place_of(key, self.files) or sources.place_of(plain, self.files) or "composed configuration"


def _compose_with_hydra(verb: str, parsed: Sequence[overrides.Override]) -> _Composed:
    # Imported here: half of the time that a mistyped key would need to be refused.
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    texts = search_path_overrides() + overrides.for_hydra(parsed)
    around = GlobalHydra.instance().hydra  # of the sweep that this job belongs to
    GlobalHydra.instance().clear()
    try:
        with (
            initialize_config_dir(str(sources.conf_dir()), version_base="1.3", job_name="nemo-align"),
            untrusted.closed_environment(),
        ):
            tree = OmegaConf.to_container(hydra_compose(verb, texts), resolve=False)
            loader = GlobalHydra.instance().config_loader()
            defaults = loader.compute_defaults_list(verb, texts, RunMode.RUN).defaults
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(hydra_message(error)) from None
    finally:
        GlobalHydra.instance().hydra = around
    assert isinstance(tree, dict)
    files = [
        (default.config_path, (default.package or "").replace("_global_", ""))
        for default in defaults
        if default.config_path is not None
    ]
    untrusted.refuse_hydra_settings(files)
    return _Composed({str(key): value for key, value in tree.items()}, files)


def search_path_overrides() -> list[str]:
    """Hydra's override for the user's own folders of YAML."""
    folders = [f'"file://{folder.resolve()}"' for folder in sources.user_dirs()]
    return [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []


def _resolve(
    verb: str, tree: dict[str, Any], check_files: bool
) -> tuple[initial_model.InitialCheckpoint | None, dict[str, Any]]:
    """Defaults below the tree, the model and tokenizer of checkpoint.init_from, interpolations replaced."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    cls = VERBS[verb]
    try:
        with untrusted.closed_environment():
            merged = OmegaConf.merge(OmegaConf.create(build.defaults_tree(cls)), OmegaConf.create(tree))
            initial = None
            init_from = _init_from(OmegaConf.to_container(merged, resolve=False))
            if init_from is not None:
                init_from = merged.checkpoint.init_from  # with its interpolations replaced
                if check_files or Path(init_from).exists():
                    initial = initial_model.read(Path(init_from))
                    chosen = tree.get("model") or {}
                    for key, value in initial.model.items():
                        if key not in chosen or chosen[key] == MISSING:
                            merged.model[key] = value
                    initial.refuse_conflicts({key: merged.model[key] for key in chosen})
                    if merged.data.tokenizer is None:
                        merged.data.tokenizer = initial.tokenizer
            resolved = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        said = _first_line(error).removeprefix("ValueError raised while resolving interpolation: ")
        raise ConfigError(f"{error.full_key}: {said}") from None
    assert isinstance(resolved, dict)
    return initial, {str(key): value for key, value in resolved.items()}


def _init_from(tree: dict[str, Any]) -> str | None:
    section = tree.get("checkpoint")
    value = section.get("init_from") if isinstance(section, dict) else None
    return value if isinstance(value, str) and value != MISSING else None


def _refuse_missing(verb: str, config: Any, awaits_checkpoint: bool, parsed: Sequence[overrides.Override]) -> None:
    missing = build.missing_keys(config)
    model = [key for key in missing if key.startswith("model.")]
    aliases = {field: word for word, field in overrides.ALIASES.get(verb, {}).items()}
    problems = []
    needed = validation.missing_checkpoint(VERBS[verb])
    if model and needed and config.checkpoint.init_from is None:
        problems.append(needed)  # a model of one's own would not help
    elif model and not awaits_checkpoint:
        which = "no model" if len(model) > 5 else f"{', '.join(model)} missing"
        problems.append(
            f"{which}: choose one with model={'|'.join(sources.choices('model'))}, "
            "or start from a checkpoint with checkpoint.init_from=<run directory, checkpoint or Hugging Face folder>"
        )
    problems += [
        build.missing_message(VERBS[verb], key, aliases.get(key), _other_format(config, key))
        for key in missing
        if not key.startswith("model.")
    ]
    if problems or (verb == "pipeline" and not config.stages):
        problems = [*overrides.named_without_choice(parsed), *problems]
    if problems:
        raise ConfigError.of(problems)


def _other_format(config: Any, key: str) -> str | None:
    """The example for `from` or `to` of convert: what the other one is not."""
    other = {"source_format": "target_format", "target_format": "source_format"}.get(key)
    return {"hf": "megatron", "megatron": "hf"}.get(getattr(config, other)) if other else None


def hydra_message(error: BaseException) -> str:
    """Hydra's message in the words of this command."""
    from hydra.errors import OverrideParseException

    text = str(error).strip()
    if isinstance(error, OverrideParseException):
        written = error.override.removeprefix("++")
        key, _, value = written.partition("=")
        quoted = f"'{key}={_quoted(value)}'"
        return f"cannot read {written!r}: {_first_line(error)}. Text with = , : {{ }} or spaces needs quotes: {quoted}"
    if "Ambiguous value" in text:
        return f"{_first_line(error).replace('++', '')}: several values of a key are several runs, add --multirun"
    return " ".join(line.strip() for line in text.splitlines()[:3])


def _quoted(value: str) -> str:
    """The value as Hydra reads text; of a list, each item."""
    if not (value.startswith("[") and value.endswith("]")):
        return f'"{value}"'
    return "[" + ",".join(f'"{item.strip()}"' for item in value[1:-1].split(",")) + "]"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
