"""The model, reward head and tokenizer of checkpoint.init_from, read from JSON only: no torch, no weights.

A Megatron checkpoint says it in manifest.json, a Hugging Face folder in config.json.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_align.config.errors import ConfigError
from nemo_align.config.hf_model import hf_model_config, hf_reward_config
from nemo_align.config.model import ModelConfig

# May differ from the checkpoint: no weight and no result at the trained lengths depends on them.
_FREE_KEYS = ("name", "init_std", "max_sequence_length", "make_vocab_size_divisible_by")


@dataclass(frozen=True)
class InitialCheckpoint:
    """What a checkpoint says about itself."""

    kind: str  # megatron | hf
    path: Path  # of the checkpoint itself, where init_from may be its run directory
    model: dict[str, Any]  # ModelConfig's fields
    reward: dict[str, Any] | None  # attributes, weights, head_bias of a reward model
    tokenizer: str | None  # folder

    def refuse_conflicts(self, chosen: Mapping[str, Any]) -> None:
        """Refuse model keys chosen by the user that contradict the checkpoint.

        Raises:
            ConfigError: with each key, the chosen value and the checkpoint's.
        """
        wrong = [
            f"model.{key} is {value!r} but {self.model[key]!r} in the checkpoint"
            for key, value in chosen.items()
            if key in self.model and key not in _FREE_KEYS and not self._same(key, value)
        ]
        if wrong:
            raise ConfigError(
                f"the chosen model is not that of checkpoint.init_from={self.path}: {'; '.join(wrong)}. "
                "Leave model= out: the sizes come from the checkpoint"
            )

    def _same(self, key: str, value: Any) -> bool:
        if key == "head_dim":  # null means hidden_size / heads
            default = self.model["hidden_size"] // self.model["num_attention_heads"]
            return (value or default) == (self.model[key] or default)
        return value == self.model[key]


def read(init_from: Path) -> InitialCheckpoint:
    """What the checkpoint that `init_from` names says: a run directory (its newest checkpoint), a checkpoint, or a
    Hugging Face folder.

    Raises:
        ConfigError: nothing there, none of the three, or a model that is not a Nemotron-4.
    """
    if not init_from.exists():
        raise ConfigError(f"checkpoint.init_from={init_from} does not exist{_what_exists(init_from)}")
    if not init_from.is_dir():
        raise ConfigError(
            f"checkpoint.init_from={init_from} is a file: archives (.nemo, .zip, .tar) and pickled weights are not "
            "opened. Name a run directory, a checkpoint, or a Hugging Face folder with .safetensors"
        )
    folder = _newest(init_from)
    if (folder / "manifest.json").is_file():
        return _read_megatron(folder)
    if (folder / "config.json").is_file():
        return _read_hf(folder)
    raise ConfigError(
        f"checkpoint.init_from={init_from} is not a run directory with a checkpoint "
        "(checkpoints/step_*/manifest.json), a checkpoint (manifest.json) or a Hugging Face folder (config.json)"
    )


def _read_hf(folder: Path) -> InitialCheckpoint:
    try:
        model, reward = hf_model_config(folder), hf_reward_config(folder)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    described = None
    if reward is not None:
        described = {"attributes": reward.attributes, "weights": reward.weights, "head_bias": reward.head_bias}
    return InitialCheckpoint("hf", folder, dataclasses.asdict(model), described, str(folder))


def _read_megatron(folder: Path) -> InitialCheckpoint:
    path = folder / "manifest.json"
    manifest = _json(path)
    model = manifest.get("model")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if not isinstance(model, dict) or set(model) != known:
        differing = sorted(known ^ set(model)) if isinstance(model, dict) else ["model"]
        raise ConfigError(f"{path} was not written by this version: {', '.join(differing)} missing or unknown")
    tokenizer = manifest.get("tokenizer")
    if tokenizer is not None and (not isinstance(tokenizer, str) or {"..", "/"} & set(Path(tokenizer).parts)):
        raise ConfigError(f"{path}: tokenizer {tokenizer!r} leaves the checkpoint's folder")
    return InitialCheckpoint(
        "megatron", folder, model, manifest.get("reward"), str(folder / tokenizer) if tokenizer else None
    )


def _newest(folder: Path) -> Path:
    """The newest checkpoint of a run directory; any other folder is returned as it is."""
    checkpoints = folder if folder.name == "checkpoints" else folder / "checkpoints"
    found = [
        (int(match[1]), path.parent)
        for path in checkpoints.glob("step_*/manifest.json")
        if (match := re.fullmatch(r"step_(\d+)", path.parent.name))
    ]
    return max(found)[1] if found else folder


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, not an object")
    return content


def _what_exists(path: Path) -> str:
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    names = sorted(child.name for child in parent.iterdir() if not child.name.startswith("."))[:8]
    return f"; {parent} holds {', '.join(names) or 'nothing'}"
