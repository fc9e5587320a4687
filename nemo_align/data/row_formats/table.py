"""The table of row formats, and how the format of a file is found from its columns.

A row may have more columns than its format reads (ids, sources); it may not lack one that identifies the format.
Within a kind the more specific formats stand first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nemo_align.data.chat import Dialogue, Pair, Rated, RowError, column_names
from nemo_align.data.row_formats import conversations, dialogues, nemo_aligner, pairs, rated

Kind = Literal["dialogue", "pair", "rated"]


@dataclass(frozen=True)
class RowFormat:
    """A format. `convert(record)` gives Dialogue or Pair, for "rated" `convert(record, attributes)` Rated or a list."""

    name: str
    kind: Kind
    columns: tuple[str, ...]  # all needed
    convert: Callable[..., Dialogue | Pair | Rated | list[Rated]]
    needs_attributes: bool = False  # at least one configured attribute is a column
    matches: Callable[[Mapping[str, Any]], bool] | None = None  # a further look at the first row

    def fits(self, record: Mapping[str, Any], attributes: list[str]) -> bool:
        return (
            all(column in record for column in self.columns)
            and (not self.needs_attributes or any(name in record for name in attributes))
            and (self.matches is None or self.matches(record))
        )


_DIALOGUES = (
    RowFormat("messages", "dialogue", ("messages",), dialogues.messages),
    RowFormat("conversations", "dialogue", ("conversations",), conversations.dialogue),
    RowFormat(
        "helpsteer2", "dialogue", ("prompt", "response", *rated.HELPSTEER2_ATTRIBUTES), rated.helpsteer2_dialogue
    ),
    RowFormat("prompt_completion", "dialogue", ("prompt", "completion"), dialogues.prompt_and("completion")),
    RowFormat("prompt_response", "dialogue", ("prompt", "response"), dialogues.prompt_and("response")),
    RowFormat("alpaca", "dialogue", ("instruction", "output"), dialogues.alpaca),
    RowFormat("input_output", "dialogue", ("input", "output"), dialogues.prompt_and("output", "input")),
)
_PAIRS = (
    RowFormat("nemo_aligner", "pair", ("prompt", "chosen_response", "rejected_response"), nemo_aligner.preference),
    RowFormat("nemo_rl", "pair", ("context", "completions"), pairs.nemo_rl),
    RowFormat(
        "helpsteer2_preference",
        "pair",
        ("prompt", "response_1", "response_2", "preference_strength"),
        pairs.helpsteer2_preference,
    ),
    RowFormat("helpsteer3", "pair", ("context", "response1", "response2", "overall_preference"), pairs.helpsteer3),
    RowFormat("sharegpt_pair", "pair", ("conversations", "chosen", "rejected"), pairs.sharegpt),
    RowFormat("alpaca_pair", "pair", ("instruction", "chosen", "rejected"), pairs.alpaca),
    RowFormat("prompt_chosen_rejected", "pair", ("prompt", "chosen", "rejected"), pairs.prompt_chosen_rejected),
    RowFormat("chosen_rejected", "pair", ("chosen", "rejected"), pairs.chosen_rejected),
)
_RATED = (
    RowFormat("nemo_aligner_label", "rated", ("text", "label"), nemo_aligner.labelled_text),
    RowFormat("helpsteer2", "rated", ("prompt", "response", *rated.HELPSTEER2_ATTRIBUTES), rated.helpsteer2),
    RowFormat(
        "conversations_label", "rated", ("conversations",), conversations.rated, matches=conversations.has_labels
    ),
    *(
        RowFormat(
            form.name,
            "rated",
            form.columns,
            rated.with_attributes(form.convert, form.columns[-1]),
            needs_attributes=True,
        )
        for form in _DIALOGUES
        if form.name != "helpsteer2"
    ),
)
FORMATS: tuple[RowFormat, ...] = _DIALOGUES + _PAIRS + _RATED

_VERBS = {"dialogue": "sft", "pair": "preference", "rated": "reward"}


def find_format(
    record: Mapping[str, Any], kinds: tuple[Kind, ...], *, name: str = "auto", attributes: list[str] | None = None
) -> RowFormat:
    """The format of a file from its first row. `name` other than auto chooses it, and the columns must agree.

    Raises RowError if the row fits none, a plain ValueError for a name that is none."""
    attributes = attributes or []
    known = [form for kind in kinds for form in FORMATS if form.kind == kind]
    if name != "auto":
        named = [form for form in known if form.name == name]
        if not named:
            raise ValueError(
                f"format: unknown format {name!r} here; known: auto, {', '.join(form.name for form in known)}"
            )
        for form in named:
            if form.fits(record, attributes):
                return form
        raise RowError(
            "format",
            f"{name} needs {_needs(named[0], attributes)}",
            f"the row has {column_names(list(record)) or 'none'}",
            reason="columns",
        )
    for form in known:
        if form.fits(record, attributes):
            return form
    table = "; ".join(f"{form.name} ({_needs(form, attributes)})" for form in known)
    raise RowError(
        "columns",
        f"no row format fits {column_names(list(record)) or '(none)'}{_hint(record, kinds)}",
        f"rename them to those of a format: {table}",
    )


def _needs(form: RowFormat, attributes: list[str]) -> str:
    needs = ", ".join(form.columns)
    return f"{needs} and one of {', '.join(attributes)}" if form.needs_attributes else needs


def _hint(record: Mapping[str, Any], kinds: tuple[Kind, ...]) -> str:
    for form in FORMATS:
        if form.kind not in kinds and not form.needs_attributes and form.fits(record, []):
            return f" (they look like {form.name}, which nemo-align {_VERBS[form.kind]} reads)"
    return ""
