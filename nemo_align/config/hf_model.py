"""config.json of a Hugging Face `nemotron` folder -> our ModelConfig. Imports neither torch nor transformers.

The rotary part of a head was named four ways over the years, and transformers fills in a default in silence where it
does not know the name. We read the JSON ourselves, newest name first, and refuse a file that has none or contradicts
itself: with the wrong part every key fits and the logits are wrong.
"""

from __future__ import annotations

import json
from pathlib import Path

from nemo_align.config.hf_values import HFValues, shown
from nemo_align.config.model import ModelConfig
from nemo_align.config.objectives import RewardConfig
from nemo_align.config.validation_model import check_model

POLICY_CLASS, REWARD_CLASS = "NemotronForCausalLM", "NemotronForSequenceClassification"
CONFIG_FILE = "config.json"
HF_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_ROTARY_PART = ("partial_rotary_factor", "rope_percent", "rope_percentage")  # newest first
_HEAD_SIZE = ("head_dim", "kv_channels", "attention_head_dim")  # newest first

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
# What is beyond these sizes is a slip of a digit or an attack: (at most, of what).
_MOST = {
    "num_hidden_layers": (10_000, "layers"),
    "hidden_size": (10**6, "channels"),
    "intermediate_size": (10**7, "channels"),
    "num_attention_heads": (10**5, "heads"),
    "num_key_value_heads": (10**5, "heads"),
    "vocab_size": (10**8, "tokens"),
    "max_position_embeddings": (10**9, "tokens"),
    **dict.fromkeys(_HEAD_SIZE, (10**5, "channels")),
}
_MOST_ROTARY_BASE = 1e15
# How our checks call a value -> the key that the user has to correct.
_THEIR_NAMES = HF_SIZES | {
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "rotary_percent": "partial_rotary_factor",
    "rotary_base": "rope_theta",
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
        ValueError: not a nemotron model, a size or the rotary part missing, a value of another kind or out of bounds,
            values that contradict each other, or a variant that the Nemotron-4 architecture does not have (named).
    """
    values = read_hf_config(folder)
    path = values.path
    if values.values.get("model_type") != "nemotron":
        kind = shown(repr(values.values.get("model_type")))
        raise ValueError(f"{path}: model_type is {kind}, only 'nemotron' can be converted")
    for key, fixed in HF_FIXED.items():
        if (found := values.values.get(key, fixed)) != fixed:
            raise ValueError(f"{path}: {key}={shown(repr(found))}, the Nemotron-4 architecture has {fixed!r}")
    if missing := [theirs for theirs in HF_SIZES.values() if values.values.get(theirs) is None]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    rotary_percent, rotary_base = _rotary(values)
    heads = _size(values, "num_key_value_heads")
    sizes = {
        ours: _size(values, theirs) if theirs in _MOST else values.positive(theirs, most=1.0)
        for ours, theirs in HF_SIZES.items()
    }
    model = ModelConfig(
        name=values.text("_name_or_path") or Path(folder).resolve().name,
        num_query_groups=sizes["num_attention_heads"] if heads is None else heads,
        head_dim=_head_size(values),
        rotary_percent=rotary_percent,
        rotary_base=rotary_base,
        **sizes,
    )
    if problems := "; ".join(check_model(model)):
        for ours, theirs in _THEIR_NAMES.items():
            problems = problems.replace(f"model.{ours}", theirs)
        raise ValueError(f"{path} describes no model: {problems}")
    return model


def read_hf_config(folder: Path | str) -> HFValues:
    """config.json as it stands.

    Raises:
        ValueError: not there, not readable, or not a JSON object.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} has no {CONFIG_FILE}: it is not a Hugging Face model folder") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # numbers of many digits and deep nesting too
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object")
    return HFValues(values, path)


def hf_reward_config(folder: Path | str) -> RewardConfig | None:
    """Attributes of a reward model in `folder`; None if it is a policy.

    Raises:
        ValueError: a reward model whose attributes or weights are not what they should be.
    """
    values = read_hf_config(folder)
    if REWARD_CLASS not in values.texts("architectures"):
        return None
    labels = values.table("id2label")
    if not labels.values:
        raise ValueError(
            f"{values.path} is that of a reward model and lacks id2label: add the attributes' names, "
            '{"0": "helpfulness", ...}, in the order of the head\'s rows'
        )
    names = [str(number) for number in range(len(labels.values))]
    if labels.values.keys() != set(names):
        raise values.wrong("id2label", f'an object with the keys "0" to "{names[-1]}"')
    attributes = [labels.text(name) or "" for name in names]
    if len(set(attributes)) < len(attributes) or "" in attributes:
        raise values.wrong("id2label", "an object with another name for each attribute")
    table = values.table("attribute_weights")
    if unknown := table.values.keys() - set(attributes):
        raise values.wrong(
            "attribute_weights", f"an object without {shown(sorted(unknown)[0])!r}, which id2label lacks,"
        )
    weights = {name: table.number(name) for name in table.values}
    if None in weights.values():
        raise values.wrong("attribute_weights", "an object of numbers")
    return RewardConfig(
        attributes=attributes,
        weights=None if values.values.get("attribute_weights") is None else weights,
        head_bias=bool(values.flag("reward_head_bias")),
    )


def _size(values: HFValues, key: str) -> int | None:
    most, unit = _MOST[key]
    return values.size(key, most=most, unit=unit)


def _head_size(values: HFValues) -> int | None:
    """Channels of a head, every name that is there saying the same."""
    found = {name: size for name in _HEAD_SIZE if (size := _size(values, name)) is not None}
    (first, size), *others = found.items() or [("", None)]
    for name, other in others:
        if other != size:
            raise ValueError(f"{values.path}: {first}={size} contradicts {name}={other}")
    return size


def _rotary(values: HFValues) -> tuple[float, int]:
    """(part of each head, base), every name that is there saying the same."""
    path = values.path
    parts: dict[str, float | None] = {}
    bases: dict[str, float | None] = {}
    for name in ("rope_parameters", "rope_scaling"):
        table = values.table(name)
        if (kind := table.values.get("rope_type") or table.values.get("type") or "default") != "default":
            raise ValueError(
                f"{path}: {name}.rope_type={shown(repr(kind))}, the Nemotron-4 architecture has plain rotary embeddings"
            )
        parts[f"{name}.partial_rotary_factor"] = table.positive("partial_rotary_factor", most=1.0)
        bases[f"{name}.rope_theta"] = table.positive("rope_theta", most=_MOST_ROTARY_BASE)
    parts |= {name: values.positive(name, most=1.0) for name in _ROTARY_PART}
    bases["rope_theta"] = values.positive("rope_theta", most=_MOST_ROTARY_BASE)
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
