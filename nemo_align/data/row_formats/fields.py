"""Typed access to the fields of a row. A field that is null counts as absent (parquet fills columns with null)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_align.data.chat import Message, RowError

# Names that data sets use for the three roles of the template.
ROLES = {
    "system": "system",
    "System": "system",
    "user": "user",
    "User": "user",
    "human": "user",
    "assistant": "assistant",
    "Assistant": "assistant",
    "gpt": "assistant",
}
# Labels and rewards lie within +-1e6. They are kept in fp32 and the losses square them: a squared error is then at most
# 4e12, the sum over 1e9 labels 4e21, and the squared norm of the gradient (2e6 x activations of 1e3, over 1e12 weights)
# below 1e31, all far from fp32's 3.4e38. Beyond it fp32 does not even keep tenths apart (its spacing at 1e6 is 0.06).
LARGEST_NUMBER = 1e6
MISSING_LABEL = -100.0  # NeMo-Aligner's mark of a label that is not there


def text(record: Mapping[str, Any], field: str) -> str:
    """A string that must be there."""
    value = record.get(field)
    if not isinstance(value, str):
        raise RowError(field, f"expected a string, found {_kind(value)}", "write text, or remove the row")
    return encodable(value, field)


def optional_text(record: Mapping[str, Any], field: str) -> str | None:
    """A string, or None if the field is absent or null."""
    return None if record.get(field) is None else text(record, field)


def number(record: Mapping[str, Any], field: str) -> float | None:
    """A finite number, or None if the field is absent or null."""
    return as_number(record.get(field), field)


def as_number(value: Any, field: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(
            field, f"expected a number, found {_kind(value)} {value!r:.40}", "write a number, or null for missing"
        )
    if not abs(value) <= LARGEST_NUMBER:  # also NaN and infinity
        raise RowError(
            field,
            f"{value!r:.40} is no finite number within {LARGEST_NUMBER:,.0f} of zero",
            "write such a number, or null for missing",
        )
    return float(value)


def label(value: Any, field: str) -> float | None:
    """An attribute's value; None if missing (null, or NeMo-Aligner's -100)."""
    found = as_number(value, field)
    return None if found == MISSING_LABEL else found


def objects(record: Mapping[str, Any], field: str) -> list[Mapping[str, Any]]:
    """A list of objects."""
    value = record.get(field)
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise RowError(
            field, f"expected a list of objects, found {_kind(value)}", "write [{...}, ...], or remove the row"
        )
    return value


def messages(value: Any, field: str, *, role_key: str = "role", content_key: str = "content") -> list[Message]:
    """A list of turns, each an object with a role and a text."""
    if not isinstance(value, list):
        raise RowError(
            field, f"expected a list of messages, found {_kind(value)}", f'write [{{"{role_key}": ...}}, ...]'
        )
    return [
        message(item, f"{field}[{number}]", role_key=role_key, content_key=content_key)
        for number, item in enumerate(value)
    ]


def message(value: Any, field: str, *, role_key: str = "role", content_key: str = "content") -> Message:
    """One turn."""
    if not isinstance(value, Mapping):
        raise RowError(field, f"expected an object, found {_kind(value)}", f'write {{"{role_key}", "{content_key}"}}')
    if value.get("tool_calls"):
        raise RowError(f"{field}.tool_calls", "tool calls have no place in the Nemotron template", "write them as text")
    name = value.get(role_key)
    if not isinstance(name, str) or name not in ROLES:
        raise RowError(f"{field}.{role_key}", f"unknown role {name!r:.40}", f"use one of {', '.join(ROLES)}")
    content = value.get(content_key)
    if not isinstance(content, str):
        raise RowError(
            f"{field}.{content_key}", f"expected a string, found {_kind(content)}", "write text, or remove the row"
        )
    return Message(ROLES[name], encodable(content, f"{field}.{content_key}"))


def refuse_tools(record: Mapping[str, Any]) -> None:
    """Tool descriptions would be left out in silence; the Nemotron template has no place for them."""
    if record.get("tools"):
        raise RowError("tools", "the Nemotron template has no place for tools", "write them into the system turn")


def with_system(record: Mapping[str, Any], turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns, with the row's `system` column before them if it has one."""
    system = optional_text(record, "system")
    if system is None:
        return tuple(turns)
    if turns and turns[0].role == "system":
        if system and system != turns[0].content:
            raise RowError("system", "differs from the system turn of the same row", "keep one of the two")
        return tuple(turns)
    return (Message("system", system), *turns)


def encodable(value: str, field: str) -> str:
    """JSON can spell half a character (a lone surrogate), which no tokenizer takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            field, f"half a character (surrogate) at position {error.start}", "correct the text's encoding"
        ) from None
    return value


def _kind(value: Any) -> str:
    names = {type(None): "nothing", str: "a string", list: "a list", dict: "an object", bool: "true/false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
