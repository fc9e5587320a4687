"""No dead keys: every declared key is read somewhere in the package, outside the files that declare it."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

import nemo_align
from nemo_align.config import schema

PACKAGE = Path(nemo_align.__file__).parent
# Files that declare keys. A check that mentions a key does not use it: what only validation.py reads, nothing does.
DECLARE = {"model", "runtime", "training", "data", "objectives", "checkpoint", "stages", "pipeline"}
CHECK = {"validation", "validation_data", "validation_model", "validation_train", "validation_pipeline", "choices"}


def _attributes(path: Path) -> set[str]:
    return {
        node.attr for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)
    }


def _sections(cls: type, found: dict[type, None]) -> dict[type, None]:
    if cls not in found:
        found[cls] = None
        for node in schema.fields(cls).values():
            while node.item is not None:
                node = node.item
            if node.kind == "section":
                _sections(node.type, found)
    return found


def _declared() -> list[tuple[str, str]]:
    classes: dict[type, None] = {}
    for root in schema.VERBS.values():
        _sections(root, classes)
    return sorted({(cls.__name__, field.name) for cls in classes for field in dataclasses.fields(cls)})


@pytest.fixture(scope="module")
def read() -> set[str]:
    files = [
        path for path in PACKAGE.rglob("*.py") if not (path.parent.name == "config" and path.stem in DECLARE | CHECK)
    ]
    return set().union(*(_attributes(path) for path in files))


@pytest.mark.parametrize("cls, name", _declared(), ids=[f"{cls}.{name}" for cls, name in _declared()])
def test_key_is_read(cls, name, read):
    assert name in read, f"{cls}.{name} is declared but nothing reads it"
