"""NeMo-Aligner's own rows: preference v1 (templated strings) and v2 (messages), and regression `text`/`label`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_align.data.chat import Pair, Rated, RowError, check_pair, check_rated
from nemo_align.data.row_formats import dialogues, fields, pairs
from nemo_align.data.row_formats.templated_text import undo_prompt, undo_response, undo_template

# The published reward model's slots, in this order.
LABEL_SLOTS = (
    "quality",
    "toxicity",
    "humor",
    "creativity",
    "helpfulness",
    "correctness",
    "coherence",
    "complexity",
    "verbosity",
)
_REWARD_END = "\n<extra_id_2>"


def preference(record: Mapping[str, Any]) -> Pair:
    """{"prompt", "chosen_response", "rejected_response"}: all strings (v1) or messages (v2).

    Absent rewards stay absent. NeMo-Aligner puts 1 and 0 in their place; rpo would train on a gap nobody measured.
    """
    names = ("chosen_response", "rejected_response")
    if isinstance(record.get("prompt"), str):
        prompt = tuple(undo_prompt(record["prompt"], "prompt"))
        answers = [undo_response(fields.text(record, name), name) for name in names]
    else:
        prompt = dialogues.prompt(record, "prompt")
        answers = [dialogues.answer(record, name) for name in names]
    return check_pair(Pair(prompt, *answers, **pairs.rewards(record)), responses=names)


def labelled_text(record: Mapping[str, Any], attributes: list[str]) -> Rated:
    """{"text": "<extra_id_0>System\\n...\\n<extra_id_2>", "label": [9 numbers as in LABEL_SLOTS, -100 = missing]}."""
    text = fields.text(record, "text")
    if not text.endswith(_REWARD_END):
        raise RowError(
            "text", f"does not end with a newline and <extra_id_2>: {text[-40:]!r}", "write NeMo-Aligner's form"
        )
    values = record.get("label")
    if not isinstance(values, list) or len(values) != len(LABEL_SLOTS):
        found = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        raise RowError(
            "label", f"expected {len(LABEL_SLOTS)} numbers, found {found}", f"the slots are {', '.join(LABEL_SLOTS)}"
        )
    scores = {
        name: fields.label(value, f"label[{slot}]")
        for slot, (name, value) in enumerate(zip(LABEL_SLOTS, values, strict=True))
    }
    unknown = [name for name in attributes if name not in scores]
    if unknown:
        raise RowError(
            "label", f"has no slot for {', '.join(unknown)}", f"choose reward.attributes among {', '.join(LABEL_SLOTS)}"
        )
    messages = tuple(undo_template(text[: -len(_REWARD_END)], "text"))
    return check_rated(Rated(messages, {name: scores[name] for name in attributes}), "text")
