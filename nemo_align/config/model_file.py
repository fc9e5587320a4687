"""The sizes of a model from a file of the group `model`, without composing a whole configuration."""

from __future__ import annotations

import yaml

from nemo_align.config import build, sources
from nemo_align.config.errors import ConfigError
from nemo_align.config.model import ModelConfig
from nemo_align.config.suggest import did_you_mean


def read_model(name: str) -> ModelConfig:
    """conf/model/<name>.yaml, or that of the user's own folders.

    Raises:
        ConfigError: no such file, or one that does not describe a model.
    """
    known = sources.choices("model")
    if name not in known:
        raise ConfigError(f"architecture={name} is unknown{did_you_mean(name, known)} There are {', '.join(known)}")
    path = next(p for folder in sources.search_dirs() if (p := folder / "model" / f"{name}.yaml").is_file())
    tree = build.defaults_tree(ModelConfig) | (yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    model, problems = build.build(ModelConfig, tree)
    problems += [f"{key} is missing" for key in build.missing_keys(model)]
    if problems:
        raise ConfigError.of([f"{path}: {problem}" for problem in problems])
    return model
