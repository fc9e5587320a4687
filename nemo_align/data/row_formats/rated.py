"""Rows with one column per attribute: HelpSteer2, and any dialogue format with numbers beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nemo_align.data.chat import Dialogue, Message, Rated, check_dialogue, check_rated
from nemo_align.data.row_formats import fields
from nemo_align.data.row_formats.templated_text import split_helpsteer_prompt

HELPSTEER2_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def helpsteer2_dialogue(record: Mapping[str, Any]) -> Dialogue:
    """HelpSteer2's prompt (earlier turns inside, behind `<extra_id_1>` markers) and response."""
    return check_dialogue(Dialogue(_helpsteer2_messages(record)), "response")


def helpsteer2(record: Mapping[str, Any], attributes: list[str]) -> Rated:
    """HelpSteer2's columns; earlier answers inside the prompt are context and are not rated."""
    return check_rated(Rated(_helpsteer2_messages(record), scores(record, attributes)), "response")


def with_attributes(
    dialogue: Callable[[Mapping[str, Any]], Dialogue], column: str
) -> Callable[[Mapping[str, Any], list[str]], Rated]:
    """A dialogue format whose rows also have attribute columns; the last turn, in `column`, is the rated one."""

    def convert(record: Mapping[str, Any], attributes: list[str]) -> Rated:
        return check_rated(Rated(dialogue(record).messages, scores(record, attributes)), column)

    return convert


def scores(record: Mapping[str, Any], attributes: list[str]) -> dict[str, float | None]:
    """Attribute columns; absent, null and -100 are missing."""
    return {name: fields.label(record.get(name), name) for name in attributes}


def _helpsteer2_messages(record: Mapping[str, Any]) -> tuple[Message, ...]:
    prompt = split_helpsteer_prompt(fields.text(record, "prompt"), "prompt")
    return (*fields.with_system(record, prompt), Message("assistant", fields.text(record, "response")))
