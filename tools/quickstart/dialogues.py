"""Dialogues of chatterbot-corpus: categories of short conversations in YAML, a folder per language."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from quickstart.sources import package_file

ENGLISH = "english"


@dataclass(frozen=True)
class Conversation:
    """Turns in order; the first is the user's and is what the split goes by."""

    language: str
    category: str
    turns: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return self.turns[0]


def conversations() -> Iterator[Conversation]:
    """All conversations with a question and an answer, in the order of the files; exact copies once."""
    seen: set[tuple[str, ...]] = set()
    for path in sorted(_root().glob("*/*.yml")):
        for entry in _load(path).get("conversations") or ():
            if not isinstance(entry, list):
                continue  # a few files have loose strings between their conversations
            turns = tuple(_tidy(turn) for turn in map(_text, entry) if turn.strip())
            if len(turns) >= 2 and turns not in seen:
                seen.add(turns)
                yield Conversation(path.parent.name, path.stem, turns)


def messages(conversation: Conversation) -> list[dict[str, str]]:
    """Chat messages; a last turn of the user without an answer is left out."""
    turns = conversation.turns[: len(conversation.turns) // 2 * 2]
    return [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]


def _root() -> Path:
    return package_file("chatterbot_corpus", "data")


def _load(path: Path) -> dict:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader is ten times faster; not every build has it
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader) or {}


def _text(turn: object) -> str:
    """YAML reads `Yes` and `42` as a boolean and a number; `a: b` as a mapping."""
    if isinstance(turn, bool):
        return "Yes" if turn else "No"
    if isinstance(turn, dict):
        return ", ".join(f"{key}: {value}" for key, value in turn.items())
    return "" if turn is None else str(turn)


def _tidy(turn: str) -> str:
    """Code in an answer keeps its lines."""
    return "\n".join(line.rstrip() for line in turn.strip().splitlines())
