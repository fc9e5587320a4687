"""One split for all stages: a task is held out everywhere or nowhere."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable
from typing import TypeVar

TRAIN, VALIDATION = "train", "validation"
VALIDATION_PER_MILLE = 80

Row = TypeVar("Row")


def normalise(text: str) -> str:
    """Letters and digits in one case with single spaces, so that copies which differ in layout count as one task.

    A text without letters and digits is kept with its symbols; signs stay, for they tell arithmetic tasks apart."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(character if character.isalnum() or character in "+-*/=<>^%" else " " for character in folded)
    return " ".join(kept.split()) or " ".join(folded.split())


def digest(text: str) -> int:
    """A number that orders and splits texts, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(normalise(text).encode(), digest_size=8).digest(), "big")


def split_of(task: str) -> str:
    """`train` or `validation`, by the hash of the task or prompt alone."""
    return VALIDATION if digest(task) % 1000 < VALIDATION_PER_MILLE else TRAIN


def divide(rows: Iterable[tuple[str, Row]]) -> dict[str, list[Row]]:
    """Rows, each with its task, by split and in their order."""
    parts: dict[str, list[Row]] = {TRAIN: [], VALIDATION: []}
    for task, row in rows:
        parts[split_of(task)].append(row)
    return parts
