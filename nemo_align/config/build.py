"""From a plain tree to typed dataclasses: every value checked against its field's type, every missing one named."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from nemo_align.config import schema
from nemo_align.config.choices import CHOICES
from nemo_align.config.schema import MISSING, Node

# What an example in a "missing" message shows; a key that is not here shows one of its type.
EXAMPLES = {
    "train.global_batch_size": "128",
    "optimizer.lr": "3e-7",
    "steps": "1000",
    "path": "data/rows.jsonl",
    "verb": "sft",
    "source": "runs/sft",
    "target": "exported/sft",
    "source_format": "megatron",
    "target_format": "hf",
    "from_tokens": "200e9",
}
_BY_TYPE = {int: "8", float: "0.1", str: "name", bool: "true"}


def defaults_tree(cls: type) -> dict[str, Any]:
    """Plain tree of a section's defaults, MISSING where there is none."""
    tree = {}
    for field in dataclasses.fields(cls):
        node = schema.fields(cls)[field.name]
        tree[field.name] = defaults_tree(node.type) if node.kind == "section" else schema.default_of(field)
    return tree


def build(cls: type, tree: dict[str, Any]) -> tuple[Any, list[str]]:
    """An instance of the section `cls` from a plain tree without unknown keys, and what is wrong with its values.

    Values that are missing, or of another type than their field, stay as they are: the caller refuses the instance
    unless the list of problems is empty.
    """
    problems: list[str] = []
    return _section(cls, tree, "", problems), problems


def missing_keys(config: Any, prefix: str = "") -> list[str]:
    """Keys of an instance that still have no value."""
    found = []
    for field in dataclasses.fields(config):
        found += _missing_in(getattr(config, field.name), f"{prefix}{field.name}")
    return found


def missing_message(root: type, key: str, alias: str | None = None, example: str | None = None) -> str:
    """`optimizer.lr is missing: peak learning rate (number). Example: optimizer.lr=3e-7`.

    `alias`: the key as the user writes it; `example`: a value that goes with the other keys.
    """
    entry = _describe(root, key)
    leaf = key.rpartition(".")[2]
    example = example or EXAMPLES.get(key) or EXAMPLES.get(leaf) or _BY_TYPE[entry.node.type]
    meaning = f"{entry.doc} ({entry.node})" if entry.doc else str(entry.node)
    shown = alias or key
    return f"{shown} is missing: {meaning}. Example: {shown}={example}"


def _describe(root: type, name: str) -> schema.Key:
    """The schema's entry of a key with real names and list positions in it."""
    cls, node, doc = root, Node("section", root), ""
    for part in name.replace("[", ".[").split("."):
        if node.kind == "section":
            cls = node.type
            doc = schema.field_docs(cls)[part]
            node = schema.fields(cls)[part]
        else:
            assert node.item is not None
            node = node.item
    return schema.Key(name, node, MISSING, doc)


def _missing_in(value: Any, key: str) -> list[str]:
    if dataclasses.is_dataclass(value):
        return missing_keys(value, f"{key}.")
    if isinstance(value, dict):
        return [missing for name, child in value.items() for missing in _missing_in(child, f"{key}.{name}")]
    if isinstance(value, list):
        return [missing for index, child in enumerate(value) for missing in _missing_in(child, f"{key}[{index}]")]
    return [key] if value == MISSING else []


def _section(cls: type, tree: dict[str, Any], key: str, problems: list[str]) -> Any:
    values = {**defaults_tree(cls), **tree}
    prefix = f"{key}." if key else ""
    return cls(
        **{name: _value(node, values[name], f"{prefix}{name}", problems) for name, node in schema.fields(cls).items()}
    )


def _value(node: Node, value: Any, key: str, problems: list[str]) -> Any:
    if value is None and node.optional:
        return None
    if node.kind == "section" and isinstance(value, dict):
        return _section(node.type, value, key, problems)
    if node.kind == "table" and isinstance(value, dict):
        return {str(name): _value(node.item, child, f"{key}.{name}", problems) for name, child in value.items()}
    if node.kind == "list" and isinstance(value, list):
        return [_value(node.item, child, f"{key}[{index}]", problems) for index, child in enumerate(value)]
    if isinstance(value, str) and value == MISSING:
        return value
    if node.kind == "value" and not isinstance(value, (dict, list)) and value is not None:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if node.type is float and is_number:
            return float(value)
        if node.type is int and is_number and math.isfinite(value) and value == int(value):
            return int(value)  # 1e6 is a float to YAML
        if node.type is bool and isinstance(value, bool):
            return value
        if node.type is str and isinstance(value, bool) and str(value).lower() in CHOICES.get(key, ()):
            return str(value).lower()  # one word among others, which YAML takes for more
        if node.type is str and (is_number or isinstance(value, str)):
            return str(value)  # a name may look like a number
    shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."
    problems.append(f"{key} is {shown}, but must be {_article(str(node))}")
    return value


def _article(description: str) -> str:
    return description if description.startswith(("true", "names")) else f"a {description}"
