"""The dataclasses read as a tree of keys: what is a section, what is a value, of which type, and what its comment says.

Three kinds of levels: a *section* has the fields of a dataclass, a *table* (`dict[str, X]`) has names of the user's
choice, a *value* is a scalar or a list.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import io
import sys
import tokenize
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_align.config.conversion import ConvertConfig, InspectConfig, MergeConfig
from nemo_align.config.pipeline import PipelineConfig
from nemo_align.config.plan import PlanConfig
from nemo_align.config.stages import (
    PreferenceStageConfig,
    PretrainStageConfig,
    RewardStageConfig,
    ScoreStageConfig,
    SftStageConfig,
)

VERBS: dict[str, type] = {
    "pretrain": PretrainStageConfig,
    "sft": SftStageConfig,
    "reward": RewardStageConfig,
    "preference": PreferenceStageConfig,
    "score": ScoreStageConfig,
    "pipeline": PipelineConfig,
    "plan": PlanConfig,
    "convert": ConvertConfig,
    "merge": MergeConfig,
    "inspect": InspectConfig,
}
STAGE_VERBS = ("pretrain", "sft", "reward", "preference", "score")  # of the stages of a recipe
FREE_NAME = "<name>"  # stands for the user's name in a table
MISSING = "???"  # omegaconf's mark, as the dataclasses use it


@dataclass(frozen=True)
class Node:
    """The type of a key."""

    kind: str  # section | table | list | value
    type: type  # dataclass of a section, scalar type of a value
    item: Node | None = None  # of a table or list
    optional: bool = False  # null is allowed

    def __str__(self) -> str:
        names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
        if self.kind == "section":
            name = f"section with {', '.join(fields(self.type))}"
        elif self.kind == "value":
            name = names[self.type]
        else:
            shown = "sections" if self.item.kind == "section" else f"{self.item}"
            name = (
                f"list of {shown}"
                if self.kind == "list"
                else f"names, each with a {shown}".replace("a sections", "section")
            )
        return f"{name} or null" if self.optional else name


@dataclass(frozen=True)
class Key:
    """A key of a verb, with `<name>` for the free names in it."""

    name: str
    node: Node
    default: Any  # MISSING if there is none
    doc: str


def node_of(annotation: Any) -> Node:
    """The node of a type hint."""
    if isinstance(annotation, types.UnionType):
        (inner,) = [arm for arm in typing.get_args(annotation) if arm is not type(None)]
        return dataclasses.replace(node_of(inner), optional=True)
    origin = typing.get_origin(annotation)
    if origin is dict:
        return Node("table", dict, node_of(typing.get_args(annotation)[1]))
    if origin is list:
        return Node("list", list, node_of(typing.get_args(annotation)[0]))
    if dataclasses.is_dataclass(annotation):
        return Node("section", annotation)
    assert annotation in (int, float, str, bool), f"no config value has type {annotation}"
    return Node("value", annotation)


@functools.cache
def fields(cls: type) -> dict[str, Node]:
    """Nodes of the fields of a schema class."""
    hints = typing.get_type_hints(cls)
    return {field.name: node_of(hints[field.name]) for field in dataclasses.fields(cls)}


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field; MISSING if it must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    assert field.default is not dataclasses.MISSING, f"{field.name} has no default; write MISSING"
    return field.default


def keys(cls: type, prefix: str = "") -> Iterator[Key]:
    """All keys below a section, in the order of the dataclasses."""
    docs = field_docs(cls)
    for field in dataclasses.fields(cls):
        yield from _keys_of(f"{prefix}{field.name}", fields(cls)[field.name], default_of(field), docs[field.name])


def _keys_of(name: str, node: Node, default: Any, doc: str) -> Iterator[Key]:
    if node.kind == "section":
        yield from keys(node.type, f"{name}.")
    elif node.kind == "table" and node.item.kind != "value":
        yield from _keys_of(f"{name}.{FREE_NAME}", node.item, MISSING, doc)
    elif node.kind == "table":
        yield Key(f"{name}.{FREE_NAME}", node.item, default if default is None else MISSING, doc)
    elif node.kind == "list" and node.item.kind == "section":
        yield Key(name, node, default, doc)
        yield from keys(node.item.type, f"{name}[].")
    else:
        yield Key(name, node, default, doc)


def find(cls: type, key: str) -> Node | None:
    """The node of a dotted key, None if the schema has no such key."""
    node = Node("section", cls)
    for name in key.replace("[", ".[").split("."):
        if node.kind == "section" and name in fields(node.type):
            node = fields(node.type)[name]
        elif (node.kind == "table" and name) or (node.kind == "list" and name.startswith("[")):
            node = node.item
        else:
            return None
    return node


def unknown_keys(node: Node, value: Any, key: str = "") -> Iterator[str]:
    """Dotted keys of a plain tree that the schema does not have."""
    if isinstance(value, dict) and node.kind == "section":
        for name, child in value.items():
            full = f"{key}.{name}" if key else str(name)
            if name in fields(node.type):
                yield from unknown_keys(fields(node.type)[name], child, full)
            else:
                yield full
    elif isinstance(value, dict) and node.kind == "table":
        for name, child in value.items():
            yield from unknown_keys(node.item, child, f"{key}.{name}")
    elif isinstance(value, list) and node.kind == "list":
        for index, child in enumerate(value):
            yield from unknown_keys(node.item, child, f"{key}[{index}]")


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The comment behind each field of a schema class; a field without one inherits that of the class it overrides."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            own = _module_docs(base.__module__).get(base.__name__, {})
            docs.update({name: doc for name, doc in own.items() if doc or name not in docs})
    return docs


@functools.cache
def _module_docs(module: str) -> dict[str, dict[str, str]]:
    source = Path(sys.modules[module].__file__).read_text(encoding="utf-8")
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        node.name: {
            line.target.id: next((comments[n] for n in range(line.lineno, line.end_lineno + 1) if n in comments), "")
            for line in node.body
            if isinstance(line, ast.AnnAssign)
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }
