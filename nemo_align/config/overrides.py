"""Overrides of the command line, checked against the schema before Hydra (and its import) sees them.

`key=value` sets a value, `group=choice` selects a file, `+experiment=recipe/stage` adds the differences of a stage,
`~key` takes something away. Hydra wants `+` for a key that no YAML file mentions and accepts any key with `+` or `++`.
Here every key must exist in the schema, and then no `+` is needed: what passes goes to Hydra as `++key=value`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_align.config import schema, sources, suggest
from nemo_align.config.errors import ConfigError

# Words that Python reserves, so that no dataclass field can have them.
ALIASES = {"convert": {"from": "source_format", "to": "target_format"}, "merge": {"to": "target_format"}}
POSITIONAL = {"inspect": "path"}  # `inspect PATH` reads better than `inspect path=PATH`
_FORM = re.compile(r"(?P<prefix>\+\+|\+|~)?(?P<key>[^=@]+)(?P<package>@[^=]*)?(?:=(?P<value>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Override:
    """One argument of the command line."""

    text: str  # as written
    prefix: str  # "", "+", "++" or "~"
    key: str  # aliases resolved
    package: str  # "@..." of a group, or ""
    value: str | None  # None: `~key` without a value
    is_group: bool
    is_hydra: bool  # sets Hydra itself (hydra.*)

    def for_hydra(self) -> str:
        """The text that Hydra gets."""
        if self.is_hydra or self.prefix == "~":
            return self.text
        if self.is_group and self.value == "null":
            return f"~{self.key}"  # Hydra knows null in a defaults list only
        if self.is_group:
            prefix = "+" if self.key == sources.EXPERIMENT else self.prefix
            return f"{prefix}{self.key}{self.package}={self.value}"
        return f"++{self.key}={self.value}"


def parse(verb: str, arguments: Sequence[str], where: str = "command line") -> list[Override]:
    """Overrides of `arguments`, each key and choice checked. `where` they stand, for messages.

    Raises:
        ConfigError: an argument that is no override, an unknown key, group choice or experiment; all of them at once.
    """
    parsed, problems = [], []
    for text in arguments:
        if verb in POSITIONAL and _is_path(text):
            quoted = text.replace('"', '\\"')
            text = f'{POSITIONAL[verb]}="{quoted}"'
        try:
            parsed.append(_parse(verb, text, where))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError.of(problems)
    return parsed


def _is_path(text: str) -> bool:
    """Whether an argument is a path rather than key=value: `runs/lr=1e-4` is one."""
    return "=" not in text or "/" in text.partition("=")[0] or Path(text).exists()


def for_hydra(overrides: Sequence[Override]) -> list[str]:
    """What Hydra gets. The name of the run is not for Hydra, which knows `experiment` only as a group."""
    return [override.for_hydra() for override in overrides if override.is_group or override.key != sources.EXPERIMENT]


def experiment_name(overrides: Sequence[Override]) -> str | None:
    """The name given with experiment=, else the last experiment chosen with +experiment=, None without either."""
    named = [o for o in overrides if o.key == sources.EXPERIMENT and o.value is not None and o.prefix != "~"]
    named.sort(key=lambda override: not override.is_group)  # stable: a name of the user's goes last, and so wins
    return _listed(named[-1].value)[-1] if named else None


def named_without_choice(overrides: Sequence[Override]) -> list[str]:
    """What to say where keys are missing, no experiment is chosen, and experiment=<name> without + is nearly one."""
    if any(o.key == sources.EXPERIMENT and o.is_group for o in overrides):
        return []
    names = [o.value for o in overrides if o.key == sources.EXPERIMENT and o.value is not None]
    return [
        f"experiment={name} names the run, and no experiment is chosen; did you mean '+experiment={guess}'?"
        for name in names[-1:]
        if (guess := suggest.nearest(name, sources.choices(sources.EXPERIMENT), 0.7))
    ]


def _parse(verb: str, text: str, where: str) -> Override:
    match = _FORM.fullmatch(text)
    if match is None or (match["value"] is None and match["prefix"] != "~"):
        raise ConfigError(_not_an_override(verb, text))
    key = ALIASES.get(verb, {}).get(match["key"], match["key"])
    is_hydra = key == "hydra" or key.startswith(("hydra.", "hydra/"))
    is_group = _is_group(verb, key, match["prefix"] or "", match["value"])
    override = Override(text, match["prefix"] or "", key, match["package"] or "", match["value"], is_group, is_hydra)
    if is_hydra:
        return override
    if is_group and match["value"] is not None:
        _check_choice(verb, override, where)
    elif not is_group and schema.find(schema.VERBS[verb], key) is None:
        raise ConfigError(f"{_unknown(verb, key)} ({where}: {text})")
    elif match["value"] == "{}":
        raise ConfigError(f"{text} would change nothing, because sections are merged: ~{key} empties it ({where})")
    return override


def _is_group(verb: str, key: str, prefix: str, value: str | None) -> bool:
    """`model=tiny` selects a file; `experiment=name` without + names the run, unless an experiment is called so."""
    if key == sources.EXPERIMENT:
        is_choice = value is not None and set(_listed(value)) <= set(sources.choices(key))
        return prefix in ("+", "~") or is_choice
    return key in sources.groups() and schema.find(schema.VERBS[verb], key) is not None


def _check_choice(verb: str, override: Override, where: str) -> None:
    known = sources.choices(override.key)
    if verb == "pipeline" and override.key == "data":  # its section of that name is no group
        text = override.text.lstrip("+")
        raise ConfigError(f"{text}: a choice for a stage: 'stages.<name>.overrides=[\"{text}\"]' ({where})")
    for value in _listed(override.value or ""):
        if value in known or (value == "null" and override.key != sources.EXPERIMENT):
            continue
        if value.startswith("{"):
            raise ConfigError(f"{override.text}: set one key at a time, as in {override.key}.<key>=<value>")
        what = "experiment" if override.key == sources.EXPERIMENT else f"{override.key} choice"
        shown = [name for name, _ in sources.experiments(verb)] if override.key == sources.EXPERIMENT else known
        guess = suggest.did_you_mean(value, known) or "."
        raise ConfigError(
            f"unknown {what} '{value}'{guess} Known: {', '.join(shown) or 'none'} ({where}: {override.text})"
        )


def _listed(value: str) -> list[str]:
    """Single values of `a`, `[a,b]` or, in a sweep, `a,b`."""
    return [part.strip().strip("'\"") for part in value.strip().strip("[]").split(",")]


def _unknown(verb: str, key: str) -> str:
    if "/" in key:
        return f"unknown group '{key}'{suggest.did_you_mean(key, sources.groups())}"
    return suggest.unknown_key_message(key, verb)


def _not_an_override(verb: str, text: str) -> str:
    if text in sources.choices(sources.EXPERIMENT):
        return f"'{text}' is not key=value; did you mean '+experiment={text}'?"
    if text.startswith("-"):
        return f"unknown option '{text}'; see `nemo-align {verb} --help`"
    return f"'{text}' is not key=value; write for example train.max_steps=100, or +experiment=<name>"
