"""What a row says, whatever its format: a dialogue, a pair of responses, or a rated response. And what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from typing import Literal

Role = Literal["system", "user", "assistant"]

_LONGEST_MESSAGE = 2000  # characters: a message may quote the names of a row's columns, which may be anything


class RowError(ValueError):
    """A row is wrong. Names the field, the problem and the remedy; the reader puts file and line before it.

    `field` is the field's path; `reason` groups the rows of a report: the path without positions, unless given."""

    def __init__(self, field: str, problem: str, remedy: str, *, reason: str | None = None) -> None:
        super().__init__(printable(f"{field}: {problem}; {remedy}"))
        self.field = printable(field)
        self.reason = reason or re.sub(r"\[\d+\]", "[]", self.field)


class UnreadableRow(RowError):
    """The whole row is wrong, not one of its fields."""

    def __init__(self, problem: str, remedy: str, *, reason: str) -> None:
        super().__init__("row", problem, remedy, reason=reason)
        self.args = (printable(f"{problem}; {remedy}"),)


def printable(text: str) -> str:
    """`text` on one line that any terminal, log and socket takes: control characters and half characters escaped."""
    kept = text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in kept)


def column_names(names: Sequence[str]) -> str:
    """The names of a row's columns for a message: the first of them, none at length."""
    shown = [name if len(name) <= 40 else f"{name[:40]}..." for name in list(names)[:20]]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return printable(", ".join(shown)) + more


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Dialogue:
    """[system], then user and assistant in turns, with at least one assistant turn."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Pair:
    """A prompt that ends with a user turn, and two responses. A reward is None where the row has none."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    is_tie: bool = False  # the source itself calls neither better
    # Where the responses stand in the row, for messages.
    columns: tuple[str, str] = dataclass_field(default=("chosen", "rejected"), compare=False)


@dataclass(frozen=True)
class Rated:
    """A dialogue that ends with the rated assistant turn; a score is None where it is missing."""

    messages: tuple[Message, ...]
    scores: Mapping[str, float | None]


def check_turns(messages: Sequence[Message], field: str) -> None:
    """An optional system turn first, then user, assistant, user, ... beginning with the user."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise RowError(field, "no turns", "give at least one user and one assistant turn, or remove the row")
    for number, message in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if message.role != expected:
            place = f"turn {number + 1 + len(messages) - len(turns)}"
            raise RowError(
                field,
                f"{place} is {message.role}, expected {expected}",
                "the template takes an optional system turn, then user and assistant in turns; merge or remove turns",
            )


def check_dialogue(dialogue: Dialogue, field: str) -> Dialogue:
    """A dialogue that can be trained on: some assistant turn, none of them empty."""
    check_turns(dialogue.messages, field)
    if not any(message.role == "assistant" for message in dialogue.messages):
        raise RowError(field, "no assistant turn, so nothing to learn", "remove the row")
    for number, message in enumerate(dialogue.messages):
        if message.role == "assistant" and not message.content.strip():
            raise RowError(field, f"turn {number + 1} is an empty response", "remove the turn or the row")
    return dialogue


def check_pair(pair: Pair, *, prompt: str = "prompt", responses: tuple[str, str] = ("chosen", "rejected")) -> Pair:
    """A prompt that a response can follow, two responses, and rewards for both or for none.

    `prompt` and `responses` (chosen, rejected) are the columns that hold them."""
    check_prompt(pair.messages, prompt)
    for field, response in zip(responses, (pair.chosen, pair.rejected), strict=True):
        if not response.strip():
            raise RowError(field, "empty response", "remove the row")
    if (pair.chosen_reward is None) != (pair.rejected_reward is None):
        missing = "chosen_reward" if pair.chosen_reward is None else "rejected_reward"
        raise RowError(missing, "missing while the other response has one", "give both rewards or neither")
    return replace(pair, columns=responses)


def check_rated(rated: Rated, field: str) -> Rated:
    """A rated response stands last; earlier turns are context and may be empty."""
    check_turns(rated.messages, field)
    last = rated.messages[-1]
    if last.role != "assistant" or not last.content.strip():
        raise RowError(
            field, "the last turn is not a response", "the rated assistant turn must stand last and not be empty"
        )
    for name, score in rated.scores.items():
        assert score is None or math.isfinite(score), (name, score)
    return rated


def check_prompt(messages: Sequence[Message], field: str = "prompt") -> None:
    """Turns that end with the user's."""
    check_turns(messages, field)
    if messages[-1].role != "user":
        raise RowError(
            field, "it ends with an assistant turn", "a prompt ends with the user turn that the response answers"
        )
