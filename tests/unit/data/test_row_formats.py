# ruff: noqa: E501  (tables: one case per line)
"""Every row format becomes what its table entry says, and bad rows are refused with the field and a remedy."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_align.config.choices import ROW_FORMATS
from nemo_align.data.chat import Dialogue, Message, Pair, Rated, RowError
from nemo_align.data.row_formats.nemo_aligner import LABEL_SLOTS
from nemo_align.data.row_formats.table import FORMATS, find_format

FIVE = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
SYSTEM, USER, ASSISTANT = (lambda text, role=role: Message(role, text) for role in ("system", "user", "assistant"))
QA = (USER("q"), ASSISTANT("a"))
TWO_TURNS = (USER("q1"), ASSISTANT("a1"), USER("q2"))
TEMPLATED = "<extra_id_0>System\n\n<extra_id_1>User\nq1\n<extra_id_1>Assistant\na1\n<extra_id_1>User\nq2\n"


def chat(*contents: str, roles: tuple[str, str] = ("user", "assistant")) -> list[dict[str, str]]:
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]


def sharegpt(*contents: str, roles: tuple[str, str] = ("human", "gpt")) -> list[dict[str, str]]:
    return [{"from": roles[n % 2], "value": text} for n, text in enumerate(contents)]


def convert(kind: str, record: dict[str, Any], attributes: list[str] = FIVE) -> tuple[str, Any]:
    form = find_format(record, (kind,), attributes=attributes)
    return form.name, form.convert(record, attributes) if kind == "rated" else form.convert(record)


DIALOGUES = [
    ("messages", {"messages": chat("q", "a"), "id": 7}, QA),
    ("messages", {"messages": chat("q", "a"), "system": "s"}, (SYSTEM("s"), *QA)),
    ("messages", {"messages": [{"role": "system", "content": ""}, *chat("q", "a")]}, (SYSTEM(""), *QA)),
    ("messages", {"messages": chat("q1", "a1", "q2"), "tools": None}, TWO_TURNS),
    ("prompt_completion", {"prompt": "q", "completion": "a"}, QA),
    ("prompt_completion", {"prompt": chat("q1", "a1", "q2"), "completion": [{"role": "assistant", "content": "a2"}]}, (*TWO_TURNS, ASSISTANT("a2"))),
    ("prompt_response", {"prompt": "q", "response": "a"}, QA),
    ("input_output", {"input": "q", "output": "a"}, QA),
    ("alpaca", {"instruction": "do", "input": "this", "output": "a"}, (USER("do\nthis"), ASSISTANT("a"))),
    ("alpaca", {"instruction": "q2", "input": "", "output": "a2", "history": [["q1", "a1"]], "system": "s"}, (SYSTEM("s"), *TWO_TURNS, ASSISTANT("a2"))),
    ("conversations", {"conversations": sharegpt("q", "a")}, QA),
    ("conversations", {"conversations": sharegpt("q", "a", roles=("User", "Assistant")), "system": "s", "mask": "User", "type": None}, (SYSTEM("s"), *QA)),
    ("helpsteer2", {"prompt": "q1\n<extra_id_1>Assistant\na1\n<extra_id_1>User\nq2", "response": "a2", **dict.fromkeys(FIVE, 1)}, (*TWO_TURNS, ASSISTANT("a2"))),
    ("prompt_response", {"prompt": "q1\n<extra_id_1>Assistant\na1", "response": "a"}, (USER("q1\n<extra_id_1>Assistant\na1"), ASSISTANT("a"))),
]  # fmt: skip

PAIRS = [
    ("prompt_chosen_rejected", {"prompt": "q", "chosen": "a", "rejected": "b"}, Pair((USER("q"),), "a", "b")),
    ("prompt_chosen_rejected", {"prompt": chat("q1", "a1", "q2"), "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b", "chosen_reward": 2, "rejected_reward": 0.5}, Pair(TWO_TURNS, "a", "b", 2.0, 0.5)),
    ("prompt_chosen_rejected", {"prompt": "q2", "chosen": chat("q1", "a1", "q2", "a"), "rejected": chat("q1", "a1", "q2", "b"), "score_chosen": 8.0, "score_rejected": 7.5, "messages": []}, Pair(TWO_TURNS, "a", "b", 8.0, 7.5)),
    ("prompt_chosen_rejected", {"prompt": chat("q"), "chosen": chat("q", "a"), "rejected": chat("q", "b"), "system": "s"}, Pair((SYSTEM("s"), USER("q")), "a", "b")),
    ("prompt_chosen_rejected", {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1.0, "score_rejected": 9.0, "chosen_reward": 3.0, "rejected_reward": 2.0}, Pair((USER("q"),), "a", "b", 3.0, 2.0)),
    ("chosen_rejected", {"chosen": chat("q", "a"), "rejected": chat("q", "b")}, Pair((USER("q"),), "a", "b")),
    ("alpaca_pair", {"instruction": "do", "input": "this", "chosen": "a", "rejected": "b"}, Pair((USER("do\nthis"),), "a", "b")),
    ("sharegpt_pair", {"conversations": sharegpt("q"), "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}, Pair((USER("q"),), "a", "b")),
    ("nemo_aligner", {"prompt": TEMPLATED + "<extra_id_1>Assistant\n", "chosen_response": "a\n<extra_id_1>", "rejected_response": "b\n\n<extra_id_1>", "chosen_reward": 1.0, "rejected_reward": 0.0}, Pair((SYSTEM(""), *TWO_TURNS), "a", "b\n", 1.0, 0.0)),
    ("nemo_aligner", {"prompt": chat("q"), "chosen_response": {"role": "assistant", "content": "a"}, "rejected_response": {"role": "assistant", "content": "b"}}, Pair((USER("q"),), "a", "b")),
    ("nemo_rl", {"context": chat("q"), "completions": [{"rank": 1, "completion": [{"role": "assistant", "content": "b"}], "reward": -1}, {"rank": 0, "completion": [{"role": "assistant", "content": "a"}], "reward": 2}]}, Pair((USER("q"),), "a", "b", 2.0, -1.0)),
    ("helpsteer2_preference", {"prompt": "q1\n<extra_id_1>Assistant\na1\n<extra_id_1>User\nq2", "response_1": "a", "response_2": "b", "preference_strength": -2}, Pair(TWO_TURNS, "a", "b")),
    ("helpsteer2_preference", {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0}, Pair((USER("q"),), "a", "b", is_tie=True)),
    ("helpsteer3", {"context": chat("q"), "response1": "b", "response2": "a", "overall_preference": 3}, Pair((USER("q"),), "a", "b")),
]  # fmt: skip

SCORES = dict(zip(FIVE, (4.0, 3.0, 4.0, None, 1.0), strict=True))
COLUMNS = dict(zip(FIVE, (4, 3, 4, None, 1), strict=True))
RATED = [
    ("helpsteer2", {"prompt": "q1\n<extra_id_1>Assistant\na1\n<extra_id_1>User\nq2", "response": "a2", **COLUMNS}, Rated((*TWO_TURNS, ASSISTANT("a2")), SCORES)),
    ("messages", {"messages": chat("q", "a"), **COLUMNS}, Rated(QA, SCORES)),
    ("nemo_aligner_label", {"text": TEMPLATED + "<extra_id_1>Assistant\na2\n<extra_id_2>", "label": [-100, -100, -100, -100, 4, 3, 4, -100, 1]}, Rated((SYSTEM(""), *TWO_TURNS, ASSISTANT("a2")), SCORES)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "record", "messages"), DIALOGUES)
def test_dialogues(name: str, record: dict[str, Any], messages: tuple[Message, ...]) -> None:
    assert convert("dialogue", record) == (name, Dialogue(messages))


@pytest.mark.parametrize(("name", "record", "pair"), PAIRS)
def test_pairs(name: str, record: dict[str, Any], pair: Pair) -> None:
    assert convert("pair", record) == (name, pair)


@pytest.mark.parametrize(("name", "record", "rated"), RATED)
def test_rated(name: str, record: dict[str, Any], rated: Rated) -> None:
    assert convert("rated", record) == (name, rated)


def test_each_labelled_turn_is_an_example() -> None:
    turns = sharegpt("q1", "a1", "q2", "a2", roles=("User", "Assistant"))
    turns[1]["label"] = "helpfulness:4,correctness:-100"
    turns[3]["label"] = "verbosity:1.5"
    name, found = convert("rated", {"conversations": turns, "system": "s", "mask": "User", "type": "VALUE_TO_TEXT"})
    assert name == "conversations_label"
    assert [len(rated.messages) for rated in found] == [3, 5]
    assert found[0].scores == dict.fromkeys(FIVE) | {"helpfulness": 4.0}
    assert found[1].scores == dict.fromkeys(FIVE) | {"verbosity": 1.5}


def test_attributes_have_names_not_places() -> None:
    record = {"prompt": "q\n<extra_id_1>User\nx", "response": "a", "clarity": 7, "safety": None}
    name, rated = convert("rated", record, ["safety", "clarity"])
    assert name == "prompt_response"
    assert rated.scores == {"safety": None, "clarity": 7.0}
    assert rated.messages[0].content == "q\n<extra_id_1>User\nx", "only HelpSteer2's own prompts hold turns"
    assert len(LABEL_SLOTS) == 9 and list(LABEL_SLOTS[4:]) == FIVE


def test_the_table_has_an_example_of_every_format() -> None:
    shown = {("dialogue", name) for name, *_ in DIALOGUES} | {("pair", name) for name, *_ in PAIRS}
    shown |= {("rated", name) for name, *_ in RATED} | {("rated", "conversations_label"), ("rated", "prompt_response")}
    same_code = {("rated", form.name) for form in FORMATS if form.needs_attributes}
    assert {(form.kind, form.name) for form in FORMATS} == shown | same_code


def bad(kind: str, record: dict[str, Any], message: str) -> Any:
    return pytest.param(kind, record, message, id=message[:50])


BAD_ROWS = [
    bad("dialogue", {"messages": []}, "messages: no turns"),
    bad("dialogue", {"messages": None}, "messages: expected a list of messages, found nothing"),
    bad("dialogue", {"messages": chat("q")}, "messages: no assistant turn"),
    bad("dialogue", {"messages": chat("q", "a")[1:]}, "messages: turn 1 is assistant, expected user"),
    bad("dialogue", {"messages": [*chat("q", "a"), {"role": "assistant", "content": "b"}]}, "turn 3 is assistant, expected user"),
    bad("dialogue", {"messages": [{"role": "system", "content": "s"}] * 2 + chat("q", "a")}, "turn 2 is system, expected user"),
    bad("dialogue", {"messages": chat("q", " \n")}, "turn 2 is an empty response"),
    bad("dialogue", {"messages": chat("q", "a", roles=("user", "tool"))}, r"messages\[1\].role: unknown role 'tool'"),
    bad("dialogue", {"messages": [{"role": "user", "content": 5}, *chat("q", "a")[1:]]}, r"messages\[0\].content: expected a string, found a number"),
    bad("dialogue", {"messages": ["hi"]}, r"messages\[0\]: expected an object, found a string"),
    bad("dialogue", {"messages": [*chat("q"), {"role": "assistant", "tool_calls": [{}]}]}, r"messages\[1\].tool_calls"),
    bad("dialogue", {"messages": chat("q", "a"), "tools": [{"name": "f"}]}, "tools: the Nemotron template has no place"),
    bad("dialogue", {"messages": chat("q", "\ud800")}, "half a character"),
    bad("dialogue", {"prompt": "q", "completion": None}, "completion: expected an object, found nothing"),
    bad("dialogue", {"prompt": chat("q", "a"), "completion": "b"}, "prompt: it ends with an assistant turn"),
    bad("dialogue", {"prompt": "q", "completion": chat("a", "b")}, "completion: 2 messages"),
    bad("dialogue", {"instruction": "q", "output": "a", "history": [["u"]]}, r"history\[0\]: expected \[user, assistant\]"),
    bad("dialogue", {"conversations": sharegpt("q", "a"), "mask": "Assistant"}, "mask: 'Assistant' would leave"),
    bad("dialogue", {"conversations": [{**turn, "label": "quality:4"} for turn in sharegpt("q", "a")], "type": "VALUE_TO_TEXT"}, "type: 'VALUE_TO_TEXT' with labels"),
    bad("pair", {"prompt": "q", "chosen": "a", "rejected": ""}, "rejected: empty response"),
    bad("pair", {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_reward": 1.0}, "rejected_reward: missing while"),
    bad("pair", {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_reward": float("nan"), "rejected_reward": 1}, "chosen_reward: nan is no finite"),
    bad("pair", {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_reward": 10**400, "rejected_reward": 1}, "chosen_reward: 1000"),
    bad("pair", {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_reward": "4", "rejected_reward": 1}, "chosen_reward: expected a number, found a string '4'"),
    bad("pair", {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_reward": True, "rejected_reward": 1}, "chosen_reward: expected a number"),
    bad("pair", {"chosen": "Human: q Assistant: a", "rejected": "Human: q Assistant: b"}, "chosen: a string without a prompt"),
    bad("pair", {"chosen": chat("q", "a"), "rejected": chat("Q", "b")}, "rejected: differs from chosen before the last"),
    bad("pair", {"prompt": "other", "chosen": chat("q", "a"), "rejected": chat("q", "b")}, "prompt: is not a user turn"),
    bad("pair", {"prompt": chat("other"), "chosen": chat("q", "a"), "rejected": "b"}, "chosen: its messages before the last"),
    bad("pair", {"prompt": "plain", "chosen_response": "a", "rejected_response": "b"}, "prompt: does not start with the Nemotron"),
    bad("pair", {"prompt": TEMPLATED, "chosen_response": "a", "rejected_response": "b"}, "prompt: does not end with <extra_id_1>Assistant"),
    bad("pair", {"prompt": TEMPLATED + "<extra_id_1>Assistant\n", "chosen_response": "a", "rejected_response": "b"}, "chosen_response: does not end with a newline"),
    bad("pair", {"context": chat("q"), "completions": [{"rank": 0, "completion": chat("a")}]}, "completions: 1 completions"),
    bad("pair", {"context": chat("q"), "completions": [{"completion": "a"}, {"rank": 1, "completion": "b"}]}, r"completions\[0\].rank: missing"),
    bad("pair", {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": None}, "preference_strength: missing"),
    bad("rated", {"messages": chat("q", "a", "q2"), "helpfulness": 1}, "messages: the last turn is not a response"),
    bad("rated", {"messages": chat("q", "a"), "helpfulness": "4"}, "helpfulness: expected a number, found a string"),
    bad("rated", {"messages": chat("q", "a"), "helpfulness": float("inf")}, "helpfulness: inf is no finite"),
    bad("rated", {"text": TEMPLATED + "<extra_id_1>Assistant\na", "label": [0] * 9}, "text: does not end with a newline"),
    bad("rated", {"text": TEMPLATED + "<extra_id_1>Assistant\na\n<extra_id_2>", "label": [0] * 5}, "label: expected 9 numbers, found 5"),
    bad("rated", {"text": TEMPLATED + "<extra_id_1>Assistant\n<extra_id_2>quality:4\na\n<extra_id_2>", "label": [0] * 9}, "text: a SteerLM label line"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "record", "message"), BAD_ROWS)
def test_bad_rows_name_field_problem_and_remedy(kind: str, record: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message) as caught:
        convert(kind, record)
    assert "; " in str(caught.value), "a remedy follows"


def test_unknown_columns_name_the_formats_and_the_right_verb() -> None:
    with pytest.raises(
        RowError, match=r"columns: no row format fits question, answer; .*: messages \(messages\).*input_output"
    ):
        find_format({"question": "q", "answer": "a"}, ("dialogue",))
    with pytest.raises(ValueError, match="look like prompt_chosen_rejected, which nemo-align preference reads"):
        find_format({"prompt": "q", "chosen": "a", "rejected": "b"}, ("dialogue",))
    with pytest.raises(ValueError, match="one of safety"):
        find_format({"prompt": "q", "response": "a"}, ("rated",), attributes=["safety"])


def test_a_named_format_must_be_known_and_fit() -> None:
    assert (
        find_format({"input": "", "output": "", "messages": []}, ("dialogue",), name="input_output").name
        == "input_output"
    )
    with pytest.raises(ValueError, match="unknown format 'sharegpt' here; known: auto, messages"):
        find_format({}, ("dialogue",), name="sharegpt")
    with pytest.raises(ValueError, match="alpaca needs instruction, output; the row has prompt"):
        find_format({"prompt": "q"}, ("dialogue",), name="alpaca")


@pytest.mark.parametrize("verb, kind", [("sft", "dialogue"), ("reward", "rated"), ("preference", "pair")])
def test_the_configuration_knows_every_format(verb, kind):
    assert set(ROW_FORMATS[verb]) == {"auto"} | {form.name for form in FORMATS if form.kind == kind}
