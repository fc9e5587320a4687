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
from nemo_align.config.model import ModelConfig

# May differ from the checkpoint: no weight and no result at the trained lengths depends on them.
_FREE_KEYS = ("name", "init_std", "max_sequence_length", "make_vocab_size_divisible_by")
_HF_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "layernorm_epsilon": "norm_eps",
    "init_std": "initializer_range",
}
_ROTARY_PERCENT = ("partial_rotary_factor", "rope_percent", "rope_percentage")
# What every Nemotron-4 has; a folder that says otherwise is another architecture.
_HF_FIXED = {"hidden_act": "relu2", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}


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
    folder = _newest(init_from)
    if (folder / "manifest.json").is_file():
        return _read_megatron(folder)
    if (folder / "config.json").is_file():
        return _read_hf(folder)
    raise ConfigError(
        f"checkpoint.init_from={init_from} is not a run directory with a checkpoint "
        "(checkpoints/step_*/manifest.json), a checkpoint (manifest.json) or a Hugging Face folder (config.json)"
    )


def hf_model(folder: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """ModelConfig's fields from the config.json of a Hugging Face `nemotron` folder (checkpoint-formats: mapping by
    NeMo's converters).

    Raises:
        ConfigError: another architecture, a field missing, or no rotary percentage in any of its spellings.
    """
    place = f"{folder / 'config.json'}:"
    if fields.get("model_type") != "nemotron":
        raise ConfigError(f"{place} model_type is {fields.get('model_type')!r}, but only 'nemotron' can be read")
    for name, value in _HF_FIXED.items():
        if fields.get(name, value) != value:
            raise ConfigError(f"{place} {name} is {fields[name]!r}; Nemotron-4 has {value!r}")
    if lacking := [name for name in _HF_SIZES.values() if fields.get(name) is None]:
        raise ConfigError(f"{place} {', '.join(lacking)} missing")
    percent, base = _rotary(place, fields)
    heads = fields["num_attention_heads"]
    return {
        "name": folder.resolve().name,
        **{ours: fields[theirs] for ours, theirs in _HF_SIZES.items()},
        "num_query_groups": fields.get("num_key_value_heads") or heads,
        "head_dim": fields.get("head_dim"),
        "make_vocab_size_divisible_by": ModelConfig.make_vocab_size_divisible_by,
        "rotary_percent": percent,
        "rotary_base": base,
    }


def _rotary(place: str, fields: Mapping[str, Any]) -> tuple[float, int]:
    """Rotary percentage and base: in `rope_parameters` (transformers 5), or under one of three older names. There is
    no default to fall back on: a wrong percentage loads without complaint and gives other logits."""
    nested = fields.get("rope_parameters") or {}
    scaling = fields.get("rope_scaling") or {}
    kind = nested.get("rope_type") or scaling.get("rope_type") or scaling.get("type") or "default"
    if kind != "default":
        raise ConfigError(f"{place} rope_type is {kind!r}; Nemotron-4 has plain rotary embeddings")
    found = {f"rope_parameters.{name}": nested[name] for name in _ROTARY_PERCENT if nested.get(name) is not None}
    found |= {name: fields[name] for name in _ROTARY_PERCENT if fields.get(name) is not None}
    if not found:
        raise ConfigError(
            f"{place} no rotary percentage: none of rope_parameters.partial_rotary_factor, {', '.join(_ROTARY_PERCENT)}"
        )
    if len(set(found.values())) > 1:
        raise ConfigError(f"{place} contradicting rotary percentages: {found}")
    base = nested.get("rope_theta", fields.get("rope_theta"))
    if base is None:
        raise ConfigError(f"{place} rope_theta missing")
    return float(next(iter(found.values()))), int(base)


def _read_hf(folder: Path) -> InitialCheckpoint:
    return InitialCheckpoint("hf", folder, hf_model(folder, _json(folder / "config.json")), None, str(folder))


def _read_megatron(folder: Path) -> InitialCheckpoint:
    path = folder / "manifest.json"
    manifest = _json(path)
    model = manifest.get("model")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if not isinstance(model, dict) or set(model) != known:
        differing = sorted(known ^ set(model)) if isinstance(model, dict) else ["model"]
        raise ConfigError(f"{path} was not written by this version: {', '.join(differing)} missing or unknown")
    tokenizer = manifest.get("tokenizer")
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
