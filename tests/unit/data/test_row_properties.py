"""Properties of the row formats under arbitrary JSON: a well-formed example or our error, never anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_align.config.data import RowsConfig
from nemo_align.data.chat import Dialogue, Message, Pair, Rated, RowError
from nemo_align.data.chat_template import ChatTemplate
from nemo_align.data.row_formats.fields import LARGEST_NUMBER
from nemo_align.data.row_formats.table import FORMATS, RowFormat, find_format
from nemo_align.data.rows import read_rows
from nemo_align.data.tokenizer import Tokenizer, load_tokenizer
from tests.bad_input_tally import tried
from tests.unit.data.bad_rows_corpus import FIVE, VALID, chat, places, replaced, sharegpt

COLUMNS = sorted({column for row in VALID.values() for column in row} | {"tools", "type", "reward", "score_chosen"})
KEYS = sorted({path[-1] for row in VALID.values() for path in places(row) if isinstance(path[-1], str)})
WORDS = [
    "", " ", "user", "assistant", "system", "gpt", "human", "User", "Assistant", "helpfulness:4", "x:nan", ",",
    "<extra_id_0>System\n", "<extra_id_1>", "\n<extra_id_1>User\n", "\n<extra_id_1>Assistant\n", "\n<extra_id_2>",
]  # fmt: skip
texts = st.one_of(
    st.sampled_from(WORDS), st.text(max_size=20), st.lists(st.sampled_from(WORDS), max_size=8).map("".join)
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**300), st.floats(), st.sampled_from([-100, 0, 1, -3, 3]), texts
)
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": texts, "content": st.one_of(texts, scalars)}),
        st.fixed_dictionaries({"from": texts, "value": texts}, optional={"label": st.one_of(texts, scalars)}),
    ),
    max_size=5,
)
values = st.recursive(
    st.one_of(scalars, messages, st.sampled_from([chat("q"), chat("q", "a"), sharegpt("q", "a")])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(KEYS), texts), inner, max_size=4)
    ),
    max_leaves=8,
)
# Derandomized: the same examples on each run, so that a red test is red for everybody.
FAST = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FULL = settings(FAST, max_examples=500, derandomize=False)
IDS = [pytest.param(kind, name, id=f"{kind}-{name}") for kind, name in VALID]


def check_text(text: str) -> None:
    assert isinstance(text, str)
    text.encode("utf-8")


def check_turns(turns: tuple[Message, ...], last: str) -> None:
    roles = [turn.role for turn in turns]
    roles = roles[1:] if roles[0] == "system" else roles
    assert roles and roles == [("user", "assistant")[n % 2] for n in range(len(roles))]
    assert last == "" or roles[-1] == last
    for turn in turns:
        check_text(turn.content)


def check_number(number: float | None) -> None:
    assert number is None or (isinstance(number, float) and abs(number) <= LARGEST_NUMBER)


def check_well_formed(found: Any) -> None:
    if isinstance(found, Dialogue):
        check_turns(found.messages, "")
        answers = [turn.content for turn in found.messages if turn.role == "assistant"]
        assert answers and all(answer.strip() for answer in answers)
    elif isinstance(found, Pair):
        check_turns(found.messages, "user")
        for response in (found.chosen, found.rejected):
            check_text(response)
            assert response.strip()
        assert (found.chosen_reward is None) == (found.rejected_reward is None)
        check_number(found.chosen_reward)
        check_number(found.rejected_reward)
    else:
        assert isinstance(found, Rated)
        check_turns(found.messages, "assistant")
        assert found.messages[-1].content.strip() and set(found.scores) == set(FIVE)
        for score in found.scores.values():
            check_number(score)


def check_message(refused: RowError) -> None:
    field, _, rest = str(refused).partition(": ")
    assert field == refused.field and "; " in rest, str(refused)
    assert str(refused).isprintable() and len(str(refused)) < 3000


def check_outcome(form: RowFormat | None, kind: str, record: dict[str, Any]) -> None:
    tried["generated"] += 1
    try:
        form = form or find_format(record, (kind,), attributes=FIVE)
        if not all(column in record for column in form.columns):
            return
        found = form.convert(record, FIVE) if kind == "rated" else form.convert(record)
    except RowError as error:
        check_message(error)
        return
    for example in found if isinstance(found, list) else [found]:
        check_well_formed(example)


def changed_rows(kind: str, name: str) -> st.SearchStrategy[dict[str, Any]]:
    """A valid row with up to three of its places changed."""
    valid = VALID[kind, name]
    paths = list(places(valid))

    @st.composite
    def draw_row(draw: st.DrawFn) -> dict[str, Any]:
        row = valid
        for path in draw(st.lists(st.sampled_from(paths), min_size=1, max_size=3)):
            try:
                row = replaced(row, path, draw(values))
            except (KeyError, IndexError, TypeError):  # an earlier change took the place away
                continue
        return row | draw(st.dictionaries(st.sampled_from(COLUMNS), values, max_size=1))

    return draw_row()


def the_changed_row_property(kind: str, name: str, how: settings) -> None:
    form = next(form for form in FORMATS if (form.kind, form.name) == (kind, name))

    @how
    @given(changed_rows(kind, name))
    def holds(record: dict[str, Any]) -> None:
        check_outcome(form, kind, record)

    holds()


@pytest.mark.parametrize(("kind", "name"), IDS)
def test_a_changed_row_is_well_formed_or_refused(kind: str, name: str) -> None:
    the_changed_row_property(kind, name, FAST)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "name"), IDS)
def test_many_changed_rows_are_well_formed_or_refused(kind: str, name: str) -> None:
    the_changed_row_property(kind, name, FULL)


@pytest.mark.parametrize("kind", ["dialogue", "pair", "rated"])
@FAST
@given(record=st.dictionaries(st.one_of(st.sampled_from(COLUMNS), texts), values, max_size=6))
def test_any_object_is_well_formed_or_refused(kind: str, record: dict[str, Any]) -> None:
    check_outcome(None, kind, record)


def the_file_property(folder: Path, how: settings) -> None:
    """Arbitrary bytes, and valid lines with arbitrary edits."""
    lines = [json.dumps(row).encode() for row in VALID.values()]
    edited = st.builds(
        lambda line, at, cut, put: line[: at % len(line)] + put + line[at % len(line) + cut :],
        st.sampled_from(lines),
        st.integers(0, 5000),
        st.integers(0, 6),
        st.binary(max_size=6),
    )
    contents = st.lists(st.one_of(edited, st.binary(max_size=40), st.sampled_from(lines)), max_size=6)

    @how
    @given(
        contents, st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b","]), st.sampled_from([b"", b"[", b"\xef\xbb\xbf"])
    )
    def holds(parts: list[bytes], between: bytes, start: bytes) -> None:
        tried["generated"] += 1
        path = folder / "rows.jsonl"
        path.write_bytes(start + between.join(parts) + (b"]" if start == b"[" else b""))
        for with_unreadable in (False, True):
            try:
                rows = list(read_rows(RowsConfig(path=str(path)), seed=0, with_unreadable=with_unreadable))
            except ValueError as error:
                if type(error) is not ValueError or not str(error).startswith(f"{path}:"):
                    raise
                continue
            assert all(isinstance(row.record, dict) for row in rows)
            assert [row.number for row in rows] == list(range(1, len(rows) + 1))

    holds()


def test_any_file_gives_rows_or_our_error(tmp_path: Path) -> None:
    the_file_property(tmp_path, settings(FAST, max_examples=200))


@pytest.mark.full
def test_any_of_many_files_gives_rows_or_our_error(tmp_path: Path) -> None:
    the_file_property(tmp_path, settings(FULL, max_examples=3000))


any_text = st.one_of(st.text(max_size=40), texts)
answers = any_text.filter(lambda text: bool(text.strip()))


def as_rows(system: str, question: str, answer: str, other: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The same dialogue or pair in every format that can hold any text (those that spell the template cannot)."""
    return {
        ("dialogue", "messages"): {"messages": [{"role": "system", "content": system}, *chat(question, answer)]},
        ("dialogue", "conversations"): {"conversations": sharegpt(question, answer), "system": system},
        ("dialogue", "prompt_completion"): {"prompt": question, "completion": answer, "system": system},
        ("dialogue", "prompt_response"): {"prompt": chat(question), "response": answer, "system": system},
        ("dialogue", "alpaca"): {"instruction": question, "output": answer, "system": system},
        ("dialogue", "input_output"): {"input": question, "output": chat("", answer)[1], "system": system},
        ("pair", "nemo_rl"): {
            "context": [{"role": "system", "content": system}, *chat(question)],
            "completions": [{"rank": n, "completion": text} for n, text in enumerate((answer, other))],
        },
        ("pair", "helpsteer3"): {
            "context": [{"role": "system", "content": system}, *chat(question)],
            "response1": other, "response2": answer, "overall_preference": 1,
        },
        ("pair", "sharegpt_pair"): {
            "conversations": sharegpt(question), "system": system,
            "chosen": {"from": "gpt", "value": answer}, "rejected": {"from": "gpt", "value": other},
        },
        ("pair", "alpaca_pair"): {"instruction": question, "chosen": answer, "rejected": other, "system": system},
        ("pair", "prompt_chosen_rejected"): {"prompt": question, "chosen": answer, "rejected": other, "system": system},
        ("pair", "chosen_rejected"): {"chosen": chat(question, answer), "rejected": chat(question, other),
                                      "system": system},
    }  # fmt: skip


@FAST
@given(system=any_text, question=any_text, answer=answers, other=answers)
def test_valid_rows_keep_their_texts(system: str, question: str, answer: str, other: str) -> None:
    prompt = (Message("system", system), Message("user", question))
    for (kind, name), record in as_rows(system, question, answer, other).items():
        record = json.loads(json.dumps(record))
        form = find_format(record, (kind,), name=name)
        found = form.convert(record)
        if kind == "dialogue":
            assert found == Dialogue((*prompt, Message("assistant", answer))), name
        else:
            assert found == Pair(prompt, answer, other), name


@pytest.mark.parametrize("model", ["control_model", "user_defined_model", "hf_folder"])
def test_rendering_keeps_texts_and_opens_no_turn(model: str, request: pytest.FixtureRequest) -> None:
    """Decoding the tokens of a turn gives back its text; control tokens stand where the template puts them, whatever
    the text spells."""
    tokenizer: Tokenizer = load_tokenizer(request.getfixturevalue(model))
    template = ChatTemplate(tokenizer)
    control = {
        token for token in range(tokenizer.vocab_size) if tokenizer.decode([token]) == "" != tokenizer.token_name(token)
    }
    assert {template.turn_start, template.reward_token, tokenizer.control_id("<extra_id_0>")} <= control
    injected = st.lists(
        st.one_of(st.sampled_from([*WORDS, "</s>", "<s>", "<unk>", "<0x0A>", "<|endoftext|>", "\x00"]), any_text),
        max_size=5,
    ).map("".join)

    @FAST
    @given(injected, injected, injected)
    def holds(system: str, question: str, answer: str) -> None:
        tried["generated"] += 1
        turns = [Message("system", system), Message("user", question), Message("assistant", answer)]
        rendered = template.turns(turns)
        for turn, message in zip(rendered, turns, strict=True):
            assert control.isdisjoint(turn.body) and control.isdisjoint(turn.header[1:])
            assert tokenizer.decode(turn.body) == message.content + "\n"
        tokens, _ = template.dialogue(rendered)
        marks = [token for token in tokens if token in control]
        assert marks == [tokenizer.control_id("<extra_id_0>"), *[template.turn_start] * 3]
        assert len(tokens) == sum(map(len, rendered)) + 1

    holds()
