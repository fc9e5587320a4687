"""Readers of the packages: what comes out is text of the kind that the manifest says."""

from __future__ import annotations

from pathlib import Path

from nemo_align.data.tokenizer import load_tokenizer
from quickstart.output import spread
from quickstart.wikipedia import clean


def test_wikipedia_markup_leftovers_go() -> None:
    sentence = "'''Autism''' is a disorder&nbsp;of development that a page of an encyclopaedia explains at length."
    text = f"thumb caption\n\n==Signs==\n==Causes==\n{sentence}\n* an item\n==See also==\n{sentence}"
    expected = "Causes\nAutism is a disorder of development that a page of an encyclopaedia explains at length."
    assert clean(text) == expected


def test_procedural_tasks_are_different_right_and_wrong() -> None:
    from quickstart.procedural_tasks import GENERATORS, procedural_tasks

    tasks = list(procedural_tasks(6, seed=5))
    assert {task.generator for task in tasks[: len(GENERATORS)]} == set(GENERATORS)  # in turn
    assert len({task.question for task in tasks}) == len(tasks) >= 5 * len(GENERATORS)
    assert all(task.reward == 1.0 and task.wrong.reward < 1.0 for task in tasks)
    assert len({task.wrong.mistake for task in tasks}) == 4
    assert tasks == list(procedural_tasks(6, seed=5)) != list(procedural_tasks(6, seed=6))


def test_code_tasks_are_all_there_and_each_once() -> None:
    from quickstart.code_tasks import ATTRIBUTES, code_tasks
    from quickstart.split import normalise

    tasks = code_tasks()
    scored = [task for task in tasks if task.scores is not None]
    assert len({normalise(task.task) for task in tasks}) == len({normalise(task.code) for task in tasks}) == len(tasks)
    assert (len(tasks), len(scored)) == (3240, 2749 + 1)
    assert all(
        set(task.scores) == set(ATTRIBUTES) and all(1 <= s <= 10 for s in task.scores.values()) for task in scored
    )


def test_dialogues_alternate_and_end_with_the_assistant() -> None:
    from quickstart.dialogues import conversations, messages

    found = list(conversations())
    assert len({conversation.language for conversation in found}) == 28
    for turns in map(messages, found):
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert all(turn["content"].strip() for turn in turns)


def test_the_tokenizer_keeps_every_character_and_no_text_gives_control_tokens(tmp_path: Path) -> None:
    from quickstart.tokenizer_training import NUM_EXTRA_IDS, train_tokenizer

    texts = Path(__file__).read_text(encoding="utf-8").splitlines()
    train_tokenizer(texts, tmp_path / "tokenizer.model", vocab_size=400)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    text = " def f(x):\n\treturn 1234  \n\n    # <extra_id_1> </s> \u6f22\u5b57 \U0001f600 e\u0301 \ufb01\n"
    ids = tokenizer.encode_text(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (400, 2, 3, 1)
    controls = {tokenizer.control_id(f"<extra_id_{n}>") for n in range(NUM_EXTRA_IDS)}
    assert len(controls) == NUM_EXTRA_IDS and controls.isdisjoint(ids)
    assert [tokenizer.token_name(i) for i in tokenizer.encode_text("12")][-2:] == ["1", "2"]
    newline = tokenizer.encode_text("\n")
    assert len(newline) == 1 and tokenizer.encode_text("a\n\nb").count(newline[0]) == 2  # never merged


def test_any_start_of_a_spread_list_has_the_mixture() -> None:
    mixed = spread(["a"] * 80, ["b"] * 20)
    assert len(mixed) == 100
    assert all(abs(mixed[:n].count("b") - n / 5) <= 1 for n in range(1, 101))
