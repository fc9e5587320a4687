"""Rows with a `conversations` column: NeMo's chat format and ShareGPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_align.data.chat import Dialogue, Message, Rated, RowError, check_dialogue, check_rated
from nemo_align.data.row_formats import fields


def dialogue(record: Mapping[str, Any]) -> Dialogue:
    """{"conversations": [{"from": "User"|"human"|..., "value": str}], "system"?, "mask"?: "User"}."""
    if has_labels(record) and record.get("type") is not None:
        raise RowError(
            "type",
            f"{record['type']!r:.40} with labels trains on SteerLM attribute lines, which this recipe does not use",
            "set type to null to learn the responses, or train a reward model on the labels",
        )
    return check_dialogue(Dialogue(turns(record)), "conversations")


def turns(record: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns, with the row's system column; NeMo's `mask` must name the user (the loss is on the assistant)."""
    fields.refuse_tools(record)
    mask = fields.optional_text(record, "mask")
    if mask is not None and fields.ROLES.get(mask) != "user":
        raise RowError(
            "mask", f"{mask!r:.40} would leave the assistant out of the loss", 'write "User" (the role without loss)'
        )
    found = fields.messages(record.get("conversations"), "conversations", role_key="from", content_key="value")
    return fields.with_system(record, found)


def has_labels(record: Mapping[str, Any]) -> bool:
    """Some turn carries NeMo's `label`."""
    value = record.get("conversations")
    return isinstance(value, list) and any(isinstance(turn, Mapping) and turn.get("label") for turn in value)


def rated(record: Mapping[str, Any], attributes: list[str]) -> list[Rated]:
    """One rated dialogue per labelled assistant turn; a label reads `helpfulness:4,correctness:3,...`."""
    everything = turns(record)
    offset = len(everything) - len(record["conversations"])  # 1 if the system turn came from its column
    found = []
    for number, turn in enumerate(record["conversations"]):
        if not turn.get("label"):
            continue
        field = f"conversations[{number}].label"
        scores = _parse_label(fields.text({field: turn["label"]}, field), field)
        chosen = {name: scores.get(name) for name in attributes}
        found.append(check_rated(Rated(everything[: number + offset + 1], chosen), f"conversations[{number}]"))
    if not found:
        raise RowError("conversations", "no turn has a label", "label assistant turns, or remove the row")
    return found


def _parse_label(label: str, field: str) -> dict[str, float | None]:
    scores: dict[str, float | None] = {}
    for part in label.split(","):
        name, _, value = part.partition(":")
        try:
            number = float(value)
        except ValueError:
            raise RowError(field, f"{part!r:.40} is not name:number", "write helpfulness:4,correctness:3,...") from None
        scores[name.strip()] = fields.label(number, field)
    return scores
