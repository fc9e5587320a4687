"""A valid row of every format, and the wrong rows that are made from it: every place times every wrong value."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

FIVE = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
LABELS = dict(zip(FIVE, (4, 3.5, 4, 1, -1), strict=True))
TEMPLATED = "<extra_id_0>System\n\n<extra_id_1>User\nq1\n<extra_id_1>Assistant\na1\n<extra_id_1>User\nq2\n"
REWARDS = {"chosen_reward": 2.5, "rejected_reward": -1}


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def sharegpt(*contents: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(contents)]


_DIALOGUES: dict[str, dict[str, Any]] = {
    "messages": {"messages": chat("q1", "a1", "q2", "a2")},
    "conversations": {"conversations": sharegpt("q1", "a1", "q2", "a2"), "mask": "User", "system": "s"},
    "helpsteer2": {"prompt": "q1", "response": "a1", **LABELS},
    "prompt_completion": {"prompt": chat("q1", "a1", "q2"), "completion": [{"role": "assistant", "content": "a2"}]},
    "prompt_response": {"prompt": "q1", "response": "a1"},
    "alpaca": {"instruction": "q2", "input": "more", "output": "a2", "history": [["q1", "a1"]], "system": "s"},
    "input_output": {"input": "q1", "output": "a1"},
}
_COMPLETIONS = [
    {"rank": 0, "completion": [{"role": "assistant", "content": "good"}], "reward": 2.5},
    {"rank": 1, "completion": [{"role": "assistant", "content": "worse"}], "reward": 1},
]
_LABELLED = sharegpt("q1", "a1", "q2", "a2")
_LABELLED[3]["label"] = "helpfulness:4,verbosity:1.5"
_END = "<extra_id_1>Assistant\n"
# (kind, format) -> a row. `_with` gives the rated dialogue formats their columns.
VALID: dict[tuple[str, str], dict[str, Any]] = {
    **{("dialogue", name): row for name, row in _DIALOGUES.items()},
    **{("rated", name): row | LABELS for name, row in _DIALOGUES.items()},
    ("rated", "nemo_aligner_label"): {
        "text": f"{TEMPLATED}{_END}a2\n<extra_id_2>",
        "label": [-100, -100, -100, -100, 4, 3, 4, -100, 1],
    },
    ("rated", "conversations_label"): {"conversations": _LABELLED},
    ("pair", "nemo_aligner"): {
        "prompt": TEMPLATED + _END,
        "chosen_response": "good\n<extra_id_1>",
        "rejected_response": "worse\n<extra_id_1>",
        **REWARDS,
    },
    ("pair", "nemo_rl"): {"context": chat("q1", "a1", "q2"), "completions": _COMPLETIONS},
    ("pair", "helpsteer2_preference"): {
        "prompt": "q1", "response_1": "good", "response_2": "worse", "preference_strength": -2
    },
    ("pair", "helpsteer3"): {
        "context": chat("q1"), "response1": "worse", "response2": "good", "overall_preference": 2, **REWARDS
    },
    ("pair", "sharegpt_pair"): {
        "conversations": sharegpt("q1"),
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "worse"},
    },
    ("pair", "alpaca_pair"): {"instruction": "q1", "input": "more", "chosen": "good", "rejected": "worse", **REWARDS},
    ("pair", "prompt_chosen_rejected"): {"prompt": "q1", "chosen": "good", "rejected": "worse", **REWARDS},
    ("pair", "chosen_rejected"): {"chosen": chat("q1", "good"), "rejected": chat("q1", "worse"), **REWARDS},
}  # fmt: skip

GONE = "(taken away)"
HALF = "half \ud800 a character"
WRONG_VALUES: list[Any] = [
    None, True, 7, -1.5, float("nan"), float("-inf"), 1e300, 10**400, "", " \n", HALF, "plain", [], [7], [None],
    {}, {"a": 1}, [[]], [{}], chat("only a question"), chat("q", "a", "q"), chat("q", "a")[1:],
    [*chat("q", "a"), *chat("q", "a")[1:]], [{"role": "system", "content": "s"}] * 2, [{"role": "user"}],
    [{"role": "tool", "content": "x"}], [{"role": ["user"], "content": "x"}], [{"role": "user", "content": 5}],
    sharegpt("q"), [{"from": "tool", "value": ""}],
]  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """A row with one place changed; `path` is the place, `value` what stands there now (GONE: nothing)."""

    path: tuple[Any, ...]
    value: Any
    row: dict[str, Any]
    was: Any  # what stood there

    @property
    def name(self) -> str:
        return f"{'.'.join(map(str, self.path))} = {self.value!r:.40}"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside `value`."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*path, key)
        yield from places(item, (*path, key))


def replaced(row: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    row = copy.deepcopy(row)
    holder = row
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return row


def removed(row: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    row = copy.deepcopy(row)
    holder = row
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return row


def mutations(kind: str, name: str) -> Iterator[Mutation]:
    """Every place of a valid row taken away and replaced by every wrong value; some are still valid rows."""
    valid = VALID[kind, name]
    for path in places(valid):
        if (kind, name) == ("dialogue", "helpsteer2") and path[0] in FIVE:
            continue  # numbers that sft does not read
        was = valid
        for key in path:
            was = was[key]
        yield Mutation(path, GONE, removed(valid, path), was)
        for value in WRONG_VALUES:
            yield Mutation(path, value, replaced(valid, path, value), was)


def must_be_rejected(mutation: Mutation) -> bool:
    """Whether no reading of the documented rules lets the row pass. What they leave open (an empty question, another
    number, a whole conversation as prompt) may be a valid row and is then checked to be a well-formed one."""
    column, value, was = mutation.path[0], mutation.value, mutation.was
    if value is GONE or value is None:
        optional = column in ("mask", "system", "input", "history", *LABELS, "label") and len(mutation.path) <= 2
        in_a_list = isinstance(mutation.path[-1], int)  # the turns that are left may be a dialogue
        return not (optional or (value is GONE and in_a_list) or mutation.path[-1] == "label")
    if isinstance(value, bool) or value == HALF:
        return True
    if isinstance(value, int | float):
        return not (isinstance(was, int | float) and abs(value) <= 1e6)
    if isinstance(was, int | float):
        return True
    if isinstance(was, str) and isinstance(value, dict):
        return True  # none of the objects above is a message
    if value in ("", " \n"):
        return column in ("output", "response", "completion", "chosen", "rejected", "response_1", "response_2", "text")
    return False


def broken_lines(valid: dict[str, Any]) -> dict[str, tuple[bytes, str]]:
    """name -> (line that is no row, what the message must hold); the line before the change is a valid row."""
    line = json.dumps(valid).encode()
    first = next(iter(valid))
    return {
        "cut off": (line[:-1], "not valid JSON"),
        "cut in a string": (line[: line.index(b'"') + 3], "not valid JSON"),
        "single quotes": (line.replace(b'"', b"'"), "not valid JSON"),
        "trailing comma": (line[:-1] + b",}", "not valid JSON"),
        "two objects": (line + line, "not valid JSON: Extra data"),
        "a comment": (line + b" // good", "not valid JSON: Extra data"),
        "no JSON": (b"hello", "not valid JSON"),
        "a list": (b"[" + line + b"]", "expected a JSON object, found list"),
        "a string": (b'"text"', "expected a JSON object, found str"),
        "a number": (b"12", "expected a JSON object, found int"),
        "null": (b"null", "expected a JSON object, found NoneType"),
        "an empty object": (b"{}", "missing, while earlier rows"),
        "latin-1": (b'{"%s": "caf\xe9"}' % first.encode(), "not UTF-8"),
        "utf-16": ("﻿{}".encode("utf-16-le"), "not UTF-8"),
        "bom inside": (b"\xef\xbb\xbf" + line, "not valid JSON"),
        "control character": (line.replace(b'"', b'"\x00', 1), "not valid JSON"),
        "deep list": (b"[" * 100_000, "nested too deeply"),
        "deep object": (b'{"a":' * 100_000, "nested too deeply"),
        "endless integer": (line[:-1] + b', "n": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        "key twice": (line[:-1] + b', "%s": 1}' % first.encode(), f"the key '{first}' stands there twice"),
        "nested key twice": (line[:-1] + b', "n": [{"k": 1, "k": 2}]}', "the key 'k' stands there twice"),
        "unknown columns": (b'{"question": "q", "answer": "a"}', "missing, while earlier rows"),
    }
