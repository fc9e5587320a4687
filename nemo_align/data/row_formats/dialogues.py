"""Rows that hold one dialogue: messages, prompt and answer columns, Alpaca."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nemo_align.data.chat import Dialogue, Message, RowError, check_dialogue, check_prompt
from nemo_align.data.row_formats import fields


def messages(record: Mapping[str, Any]) -> Dialogue:
    """TRL, OpenAI, NeMo-RL: {"messages": [{"role", "content"}, ...]}."""
    fields.refuse_tools(record)
    turns = fields.with_system(record, fields.messages(record.get("messages"), "messages"))
    return check_dialogue(Dialogue(turns), "messages")


def prompt_and(answer_column: str, prompt_column: str = "prompt") -> Callable[[Mapping[str, Any]], Dialogue]:
    """TRL's prompt/completion, NeMo's input/output, HelpSteer's prompt/response: strings, or lists of messages."""

    def convert(record: Mapping[str, Any]) -> Dialogue:
        fields.refuse_tools(record)
        turns = [*prompt(record, prompt_column), Message("assistant", answer(record, answer_column))]
        return check_dialogue(Dialogue(tuple(turns)), answer_column)

    return convert


def prompt(record: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    """A prompt that is a string (one user turn) or a list of messages, after the row's system column."""
    value = record.get(column)
    turns = [Message("user", fields.text(record, column))] if isinstance(value, str) else fields.messages(value, column)
    turns = fields.with_system(record, turns)
    check_prompt(turns, column)
    return turns


def answer(record: Mapping[str, Any], column: str) -> str:
    """A response that is a string, one assistant message, or a list of just one."""
    value = record.get(column)
    if isinstance(value, str):
        return fields.text(record, column)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise RowError(
            column, f"{len(value)} messages", "a response is one assistant message; put earlier turns in the prompt"
        )
    found = fields.message(value, column)
    if found.role != "assistant":
        raise RowError(column, f"the role is {found.role}", "a response is an assistant message")
    return found.content


def alpaca(record: Mapping[str, Any]) -> Dialogue:
    """{"instruction", "input"?, "output", "system"?, "history"?: [[user, assistant], ...]}; history is learnt too."""
    turns = [*alpaca_prompt(record), Message("assistant", fields.text(record, "output"))]
    return check_dialogue(Dialogue(tuple(turns)), "output")


def alpaca_prompt(record: Mapping[str, Any]) -> tuple[Message, ...]:
    """Instruction, newline, input; after the history."""
    turns: list[Message] = []
    history = record.get("history")
    if history is not None and not isinstance(history, list):
        raise RowError("history", "expected a list of [user, assistant]", "correct or remove the column")
    for number, exchange in enumerate(history or []):
        if not (isinstance(exchange, list) and len(exchange) == 2 and all(isinstance(side, str) for side in exchange)):
            raise RowError(f"history[{number}]", "expected [user, assistant], two strings", "correct or remove the row")
        user, assistant = (fields.text({f"history[{number}]": side}, f"history[{number}]") for side in exchange)
        turns += [Message("user", user), Message("assistant", assistant)]
    extra = fields.optional_text(record, "input")
    instruction = fields.text(record, "instruction")
    turns.append(Message("user", f"{instruction}\n{extra}" if extra else instruction))
    return fields.with_system(record, turns)
