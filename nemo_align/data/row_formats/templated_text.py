"""Texts that already carry the Nemotron template, undone into messages (NeMo-Aligner v1 and regression, HelpSteer2).

A text that itself contains a turn marker cannot be told from a turn; that is why we store messages.
"""

from __future__ import annotations

import re

from nemo_align.data.chat import Message, RowError

_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_SYSTEM = "<extra_id_0>System\n"
_LABEL_LINE = "<extra_id_2>"
_ROLE = {"User": "user", "Assistant": "assistant"}
_REMEDY = "give plain text in prompt/chosen/rejected or messages, or the whole Nemotron template"


def undo_template(text: str, field: str) -> list[Message]:
    """Messages of `<extra_id_0>System\\n{system}\\n<extra_id_1>User\\n{text}\\n<extra_id_1>Assistant\\n{text}`.

    The last turn keeps everything up to the end, so what follows it (a stop or reward token) is cut before the call.
    """
    if not text.startswith(_SYSTEM):
        raise RowError(field, f"does not start with the Nemotron template's system turn: {text[:40]!r}", _REMEDY)
    system, *rest = _TURN.split(text[len(_SYSTEM) :])
    if not rest:
        raise RowError(field, "no <extra_id_1>User turn after the system turn", _REMEDY)
    return [Message("system", system), *_turns(rest, field)]


def undo_prompt(text: str, field: str) -> list[Message]:
    """Messages of a prompt that ends with the header `<extra_id_1>Assistant\\n`, without that header."""
    messages = undo_template(text, field)
    if messages[-1] != Message("assistant", ""):
        raise RowError(field, "does not end with <extra_id_1>Assistant and a newline", _REMEDY)
    return messages[:-1]


def undo_response(text: str, field: str) -> str:
    """The response without its end `\\n<extra_id_1>`."""
    if not text.endswith("\n<extra_id_1>"):
        raise RowError(field, f"does not end with a newline and <extra_id_1>: {text[-40:]!r}", _REMEDY)
    return text[: -len("\n<extra_id_1>")]


def split_helpsteer_prompt(text: str, field: str) -> list[Message]:
    """HelpSteer2 prompts hold earlier turns: `{user}\\n<extra_id_1>Assistant\\n{text}\\n<extra_id_1>User\\n{user}`."""
    first, *rest = _TURN.split(text)
    return [Message("user", first), *_turns(rest, field)]


def _turns(name_and_text: list[str], field: str) -> list[Message]:
    """Messages of [name, text, name, text, ...]."""
    turns = []
    for name, content in zip(name_and_text[::2], name_and_text[1::2], strict=True):
        if content.startswith(_LABEL_LINE):
            raise RowError(
                field, "a SteerLM label line (<extra_id_2>...) opens a turn", "remove it: labels go in columns"
            )
        turns.append(Message(_ROLE[name], content))
    return turns
