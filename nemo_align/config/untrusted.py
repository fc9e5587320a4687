"""What YAML may not do: read the environment, whose secrets would end in config.yaml and logs, and set Hydra itself.

A configuration that somebody else wrote (`--config-dir`) is data. `${oc.env:NAME}` would copy a variable into the run
directory; Hydra's own section names classes (`_target_`) and logging factories that Hydra calls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from nemo_align.config import sources
from nemo_align.config.errors import ConfigError

_ENVIRONMENT = "oc.env"
_closed: list[bool] = []  # one entry per `closed_environment` that we are inside: a sweep composes its jobs inside one


@contextmanager
def closed_environment() -> Iterator[None]:
    """Inside, OmegaConf's `${oc.env:NAME}` raises ValueError with the remedy, never the variable's value."""
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    OmegaConf.register_new_resolver(_ENVIRONMENT, _refuse, replace=True)
    _closed.append(True)
    try:
        yield
    finally:
        _closed.pop()
        if not _closed:
            OmegaConf.register_new_resolver(_ENVIRONMENT, oc.env, replace=True)


def _refuse(name: str, *_: object) -> str:
    raise ValueError(
        f"${{{_ENVIRONMENT}:{name}}} reads the environment, which a configuration may not: the value would be saved in "
        f"config.yaml. What is no secret the shell can put on the command line: key=$" + name
    )


def refuse_hydra_settings(files: Iterable[tuple[str, str]]) -> None:
    """Raise ConfigError if one of the merged files, (path without .yaml, package), sets Hydra."""
    for config_path, package in files:
        place = sources.hydra_place(config_path, package)
        if place is not None:
            raise ConfigError(
                f"{place}: a file may not set hydra.*, which names code for Hydra to run; set it on the command line"
            )
