"""Rows that hold two responses to one prompt: TRL, UltraFeedback, NeMo-RL, HelpSteer, Alpaca, ShareGPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_align.data.chat import Message, Pair, RowError, check_pair
from nemo_align.data.row_formats import dialogues, fields
from nemo_align.data.row_formats.templated_text import split_helpsteer_prompt

# Tried in this order; ours, and what `nemo-align score` writes, come first.
CHOSEN_REWARDS = ("chosen_reward", "score_chosen")
REJECTED_REWARDS = ("rejected_reward", "score_rejected")

_STRONGEST = 3  # HelpSteer's preferences run from -3 to 3


def rewards(record: Mapping[str, Any]) -> dict[str, float | None]:
    """`chosen_reward` and `rejected_reward` of a row, by the first names it has, both from one family."""
    for chosen, rejected in zip(CHOSEN_REWARDS, REJECTED_REWARDS, strict=True):
        found = {"chosen_reward": fields.number(record, chosen), "rejected_reward": fields.number(record, rejected)}
        if any(value is not None for value in found.values()):
            return found
    return {"chosen_reward": None, "rejected_reward": None}


def _scored(record: Mapping[str, Any]) -> dict[str, float | None] | None:
    """The rewards that `nemo-align score` wrote beside a format's own columns, None if it did not.

    It takes chosen and rejected from this module, so its columns mean the same responses."""
    found = {name: fields.number(record, name) for name in ("chosen_reward", "rejected_reward")}
    return found if any(value is not None for value in found.values()) else None


def prompt_chosen_rejected(record: Mapping[str, Any]) -> Pair:
    """TRL with a prompt, strings or messages; also full conversations beside it (UltraFeedback-binarized)."""
    fields.refuse_tools(record)
    if isinstance(record.get("prompt"), str) and _is_conversation(record.get("chosen")):
        pair = chosen_rejected(record)
        if not any(turn.role == "user" and turn.content == record["prompt"] for turn in pair.messages):
            raise RowError(
                "prompt", "is not a user turn of chosen and rejected", "remove the column or correct the row"
            )
        return pair
    prompt = dialogues.prompt(record, "prompt")
    return check_pair(
        Pair(prompt, _after(record, "chosen", prompt), _after(record, "rejected", prompt), **rewards(record))
    )


def chosen_rejected(record: Mapping[str, Any]) -> Pair:
    """TRL without a prompt: two lists of messages that differ in the last only."""
    fields.refuse_tools(record)
    if isinstance(record.get("chosen"), str):
        raise RowError(
            "chosen", "a string without a prompt column does not say where the response begins", "add a prompt column"
        )
    chosen, rejected = (fields.messages(record.get(name), name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        raise RowError("rejected", "differs from chosen before the last message", "both must answer the same prompt")
    prompt = fields.with_system(record, chosen[:-1])
    answers = [dialogues.answer({name: record[name][-1:]}, name) for name in ("chosen", "rejected")]
    return check_pair(Pair(prompt, *answers, **rewards(record)), prompt="chosen")


def alpaca(record: Mapping[str, Any]) -> Pair:
    """{"instruction", "input"?, "chosen": str, "rejected": str}."""
    prompt = dialogues.alpaca_prompt(record)
    pair = Pair(prompt, fields.text(record, "chosen"), fields.text(record, "rejected"), **rewards(record))
    return check_pair(pair, prompt="instruction")


def sharegpt(record: Mapping[str, Any]) -> Pair:
    """{"conversations": [...], "chosen": {"from": "gpt", "value"}, "rejected": {...}}."""
    fields.refuse_tools(record)
    keys = {"role_key": "from", "content_key": "value"}
    prompt = fields.with_system(record, fields.messages(record["conversations"], "conversations", **keys))
    answers = [fields.message(record[name], name, **keys) for name in ("chosen", "rejected")]
    for name, turn in zip(("chosen", "rejected"), answers, strict=True):
        if turn.role != "assistant":
            raise RowError(f"{name}.from", f"the role is {turn.role}", "a response is from gpt")
    pair = Pair(prompt, answers[0].content, answers[1].content, **rewards(record))
    return check_pair(pair, prompt="conversations", responses=("chosen.value", "rejected.value"))


def nemo_rl(record: Mapping[str, Any]) -> Pair:
    """{"context": [messages], "completions": [{"rank", "completion": [messages], "reward"?}] x 2}; rank 0 is best."""
    context = tuple(fields.messages(record.get("context"), "context"))
    completions = fields.objects(record, "completions")
    if len(completions) != 2:
        raise RowError("completions", f"{len(completions)} completions", "keep two: the better and the worse")
    ranked = []
    for number, completion in enumerate(completions):
        field = f"completions[{number}]"
        rank = fields.as_number(completion.get("rank"), f"{field}.rank")
        if rank is None:
            raise RowError(f"{field}.rank", "missing", "write 0 for the better, 1 for the worse")
        text = dialogues.answer({f"{field}.completion": completion.get("completion")}, f"{field}.completion")
        ranked.append((rank, number, text, fields.as_number(completion.get("reward"), f"{field}.reward")))
    best, worst = sorted(ranked, key=lambda item: item[:2])
    own = {"chosen_reward": best[3], "rejected_reward": worst[3]}
    if (best[3] is None) != (worst[3] is None):
        lacks = best if best[3] is None else worst
        field = f"completions[{lacks[1]}].reward"
        raise RowError(field, "missing while the other completion has one", "give both rewards or neither")
    pair = Pair(context, best[2], worst[2], **_scored(record) or own, is_tie=best[0] == worst[0])
    columns = (f"completions[{best[1]}].completion", f"completions[{worst[1]}].completion")
    return check_pair(pair, prompt="context", responses=columns)


def helpsteer2_preference(record: Mapping[str, Any]) -> Pair:
    """response_1, response_2 and preference_strength -3..3: negative means that response 1 is better."""
    prompt = tuple(split_helpsteer_prompt(fields.text(record, "prompt"), "prompt"))
    return _by_strength(record, "prompt", prompt, ("response_1", "response_2"), "preference_strength")


def helpsteer3(record: Mapping[str, Any]) -> Pair:
    """context, response1, response2 and overall_preference: negative means that response 1 is better."""
    context = tuple(fields.messages(record.get("context"), "context"))
    return _by_strength(record, "context", context, ("response1", "response2"), "overall_preference")


def _by_strength(
    record: Mapping[str, Any],
    prompt_column: str,
    prompt: tuple[Message, ...],
    columns: tuple[str, str],
    strength_column: str,
) -> Pair:
    """The strength says which is better, but is no reward: the pair has those that `nemo-align score` added, if any."""
    strength = fields.number(record, strength_column)
    if strength is None:
        raise RowError(strength_column, "missing", "remove the row")
    if abs(strength) > _STRONGEST:
        raise RowError(
            strength_column, f"{strength:g} is out of range", f"write -{_STRONGEST} (response 1) to {_STRONGEST}"
        )
    better, worse = columns if strength <= 0 else columns[::-1]
    rated = _scored(record) or {}
    pair = Pair(prompt, fields.text(record, better), fields.text(record, worse), **rated, is_tie=strength == 0)
    return check_pair(pair, prompt=prompt_column, responses=(better, worse))


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1


def _after(record: Mapping[str, Any], column: str, prompt: tuple[Message, ...]) -> str:
    """The response in a column that holds it alone or after the whole prompt."""
    value = record.get(column)
    if _is_conversation(value):
        turns = fields.messages(value, column)
        if tuple(turns[:-1]) != prompt and tuple(turns[:-1]) != tuple(turn for turn in prompt if turn.role != "system"):
            raise RowError(column, "its messages before the last are not the prompt", "give the response alone")
        value = value[-1:]
    return dialogues.answer({column: value}, column)
