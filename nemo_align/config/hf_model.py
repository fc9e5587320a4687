"""config.json of a Hugging Face `nemotron` folder -> our ModelConfig. Imports neither torch nor transformers.

The rotary part of a head was named four ways over the years, and transformers fills in a default in silence where it
does not know the name. We read the JSON ourselves, newest name first, and refuse a file that has none or contradicts
itself: with the wrong part every key fits and the logits are wrong.
"""

from __future__ import annotations

import json
from pathlib import Path

from nemo_align.config.model import ModelConfig
from nemo_align.config.objectives import RewardConfig

POLICY_CLASS, REWARD_CLASS = "NemotronForCausalLM", "NemotronForSequenceClassification"
CONFIG_FILE = "config.json"
HF_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_ROTARY_PART = ("partial_rotary_factor", "rope_percent", "rope_percentage")  # newest first

# Ours <- Hugging Face's, for the sizes that need no thought.
HF_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "layernorm_epsilon": "norm_eps",
    "init_std": "initializer_range",
}
# What the architecture fixes; a file may leave them out, then transformers' default holds, which is the same.
HF_FIXED = {
    "hidden_act": "relu2",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}


def hf_model_config(folder: Path | str) -> ModelConfig:
    """The architecture of the Hugging Face model in `folder`.

    Raises:
        ValueError: not a nemotron model, a size or the rotary part missing, values that contradict each other, or a
            variant that the Nemotron-4 architecture does not have (named).
    """
    path = Path(folder) / CONFIG_FILE
    values = read_hf_config(folder)
    if values.get("model_type") != "nemotron":
        raise ValueError(f"{path}: model_type is {values.get('model_type')!r}, only 'nemotron' can be converted")
    for key, fixed in HF_FIXED.items():
        if values.get(key, fixed) != fixed:
            raise ValueError(f"{path}: {key}={values[key]!r}, the Nemotron-4 architecture has {fixed!r}")
    if missing := [theirs for theirs in HF_SIZES.values() if values.get(theirs) is None]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    rotary_percent, rotary_base = _rotary(values, path)
    size = values.get("head_dim")
    for old in ("kv_channels", "attention_head_dim"):
        if values.get(old) is not None:
            if size is not None and size != values[old]:
                raise ValueError(f"{path}: head_dim={size} contradicts {old}={values[old]}")
            size = values[old]
    return ModelConfig(
        name=values.get("_name_or_path") or Path(folder).resolve().name,
        num_query_groups=values.get("num_key_value_heads") or values["num_attention_heads"],
        head_dim=size,
        rotary_percent=rotary_percent,
        rotary_base=rotary_base,
        **{ours: values[theirs] for ours, theirs in HF_SIZES.items()},
    )


def read_hf_config(folder: Path | str) -> dict:
    """config.json as it stands.

    Raises:
        ValueError: not there, or not a JSON object.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {CONFIG_FILE}: it is not a Hugging Face model folder") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object")
    return values


def hf_reward_config(folder: Path | str) -> RewardConfig | None:
    """Attributes of a reward model in `folder`; None if it is a policy."""
    values = read_hf_config(folder)
    if REWARD_CLASS not in (values.get("architectures") or []):
        return None
    labels = values.get("id2label") or {}
    attributes = [labels[key] for key in sorted(labels, key=int)]
    return RewardConfig(
        attributes=attributes,
        weights=values.get("attribute_weights"),
        head_bias=values.get("reward_head_bias", False),
    )


def _rotary(values: dict, path: Path) -> tuple[float, int]:
    """(part of each head, base), every name that is there saying the same."""
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if (kind := parameters.get("rope_type") or parameters.get("type") or "default") != "default":
        raise ValueError(f"{path}: rope_type={kind!r}, the Nemotron-4 architecture has plain rotary embeddings")
    parts = {"rope_parameters.partial_rotary_factor": parameters.get("partial_rotary_factor")}
    parts |= {name: values.get(name) for name in _ROTARY_PART}
    bases = {"rope_parameters.rope_theta": parameters.get("rope_theta"), "rope_theta": values.get("rope_theta")}
    part = _agreed(parts, path, "the rotary part of a head")
    base = _agreed(bases, path, "the rotary base")
    if base != int(base):
        raise ValueError(f"{path}: rope_theta={base} is not a whole number")
    return float(part), int(base)


def _agreed(found: dict[str, float | None], path: Path, what: str) -> float:
    found = {name: value for name, value in found.items() if value is not None}
    if not found:
        raise ValueError(f"{path} does not say {what}: add rope_parameters with partial_rotary_factor and rope_theta")
    if len(set(found.values())) > 1:
        said = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(f"{path} contradicts itself about {what}: {said}; correct the wrong one")
    return next(iter(found.values()))
