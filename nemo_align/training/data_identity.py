"""What the training data is made of, source by source, so that a refused resume can say which of them changed."""

from __future__ import annotations

from pathlib import Path

from nemo_align.config.stages import TrainStageConfig
from nemo_align.data.cache_key import content_hash, indexed_hash
from nemo_align.data.tokenizer import Tokenizer

TOKENIZER_KEY = "data.tokenizer"


def describe_data(config: TrainStageConfig, tokenizer: Tokenizer) -> dict[str, str]:
    """{configuration key: hash of its content}; of an indexed set's token ids a sample, if they are many.

    Paths are no part of it: data may be moved between a stop and a resume.
    """
    data = config.data
    described = {TOKENIZER_KEY: tokenizer.fingerprint}
    cache = Path(data.cache_dir or Path(config.run_dir) / "cache")
    for name, rows in getattr(data, "train", {}).items():
        described[f"data.train.{name}"] = content_hash(Path(rows.path), cache)
    for phase_name, phase in getattr(data, "phases", {}).items():
        for name, source in phase.blend.items():
            described[f"data.phases.{phase_name}.blend.{name}"] = indexed_hash(source.path, cache)
    return described


def changes(before: dict[str, str], now: dict[str, str], config: TrainStageConfig) -> str:
    """What differs between two descriptions, for an error message."""
    keys = [key for key in dict.fromkeys([*now, *before]) if before.get(key) != now.get(key)]
    if not before:
        return "which part of it the checkpoint does not tell"
    if not keys:
        return "its files and the tokenizer are the same, so a data.* setting or the version of nemo_align is another"
    return "; ".join(f"{key}{_place(key, config)} {_what(key, before, now)}" for key in keys)


def _what(key: str, before: dict[str, str], now: dict[str, str]) -> str:
    if key not in before:
        return "is new"
    return "has other content" if key in now else "is gone"


def _place(key: str, config: TrainStageConfig) -> str:
    """` (path)` of the source under a key of the configuration; nothing where it is not there."""
    value: object = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    path = getattr(value, "path", value)
    return f" ({path})" if isinstance(path, str) else ""
