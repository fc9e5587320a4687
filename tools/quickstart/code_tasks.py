"""Task descriptions with Python code, and their scores: `codeio` and `codeio-hq` of reasoning-gym."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass

from quickstart.sources import package_file
from quickstart.split import normalise

ATTRIBUTES = ("clarity", "practice", "educational", "safety", "difficulty")


@dataclass(frozen=True)
class CodeTask:
    """A task, the code that solves it, and five scores of 1 to 10 that a language model gave (None: not scored)."""

    task: str
    code: str
    scores: dict[str, float] | None


def code_tasks() -> list[CodeTask]:
    """Both files, each task and each code once; codeio-hq first, for all of its rows are scored."""
    tasks: list[CodeTask] = []
    seen: set[str] = set()
    for row in _rows():
        task, code = row["task_description"].strip(), _tidy(row["code_sample"])
        keys = {f"task {normalise(task)}", f"code {normalise(code)}"}
        if seen.isdisjoint(keys):
            tasks.append(CodeTask(task, code, _scores(row)))
        seen |= keys
    return tasks


def _rows() -> Iterator[dict]:
    with gzip.open(package_file("reasoning_gym", "data", "codeio-hq.jsonl.gz"), "rt", encoding="utf-8") as file:
        yield from json.load(file)  # one array, whatever its name says
    with gzip.open(package_file("reasoning_gym", "data", "codeio.jsonl.gz"), "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _tidy(code: str) -> str:
    return "\n".join(line.rstrip() for line in code.strip().splitlines())


def _scores(row: dict) -> dict[str, float] | None:
    if any(row.get(name) is None for name in ATTRIBUTES):
        return None
    return {name: float(row[name]) for name in ATTRIBUTES}
