"""The same stage under another layout, and whether the package would accept it."""

from __future__ import annotations

import dataclasses
from typing import Any

from nemo_align.config.stages import TrainStageConfig
from nemo_align.config.validation_model import check_layout
from nemo_align.config.validation_train import check_batches


def variant(stage: TrainStageConfig, **changes: Any) -> TrainStageConfig:
    """A copy with `parallel.<key>`, `train.<key>` or `precision.<key>` changed; keys as `parallel__tensor=4`."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        sections.setdefault(section, {})[key] = value
    replaced = {name: dataclasses.replace(getattr(stage, name), **keys) for name, keys in sections.items()}
    return dataclasses.replace(stage, **replaced)


def differing_keys(before: TrainStageConfig, after: TrainStageConfig) -> list[str]:
    """Overrides that make `after` of `before`: keys of parallel, precision and train; replicas follow from `gpus`."""
    return [
        f"{section}.{field.name}={_as_override(value)}"
        for section in ("parallel", "precision", "train")
        for field in dataclasses.fields(getattr(after, section))
        if (value := getattr(getattr(after, section), field.name)) != getattr(getattr(before, section), field.name)
        and (section, field.name) != ("parallel", "data")
    ]


def _as_override(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def problems(stage: TrainStageConfig) -> list[str]:
    """What config/validation would say of the layout and its batches; nothing if it can run."""
    parallel = stage.parallel
    found = list(check_layout(parallel))
    if not found:
        found = list(check_layout(parallel, stage.model, stage.precision))
    if not found:
        assert parallel.data is not None
        found = list(check_batches(stage, parallel.data))
    return found
