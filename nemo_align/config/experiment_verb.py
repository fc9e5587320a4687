"""The verb that an experiment is written for, for `plan` and `doctor`, which look at stages of any."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_align.config import sources, suggest
from nemo_align.config.errors import ConfigError


def verb_of_experiment(arguments: Sequence[str], verbs: Sequence[str], *, otherwise: str) -> str | None:
    """The one of `verbs` whose command the first comments of the chosen experiment show; None without an experiment.

    `otherwise` completes the refusal of an experiment for other verbs.

    Raises:
        ConfigError: an unknown experiment, one for other verbs, or one that does not say for which.
    """
    known = sources.choices(sources.EXPERIMENT)
    prefix = f"{sources.EXPERIMENT}="
    # Without + it chooses too, unless no experiment is called so: then it names the run (config/overrides.py).
    chosen = [text.lstrip("+").removeprefix(prefix) for text in arguments if text.startswith(f"+{prefix}")]
    chosen += [name for text in arguments if text.startswith(prefix) and (name := text.removeprefix(prefix)) in known]
    if not chosen:
        return None
    name = chosen[-1]
    if name not in known:
        raise ConfigError(f"unknown experiment '{name}'{suggest.did_you_mean(name, known)}")
    shown = sources.verbs_of_experiment(name)
    found = [verb for verb in verbs if verb in shown]
    if shown and not found:
        raise ConfigError(f"experiment {name} is for {', '.join(sorted(shown))}, {otherwise}")
    if len(found) != 1:
        raise ConfigError(f"experiment {name} does not say its verb: add verb=<one of {', '.join(found or verbs)}>")
    return found[0]
