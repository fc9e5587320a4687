"""The Nemotron template: its text, its tokens, its loss mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nemo_align.data.chat import Message
from nemo_align.data.chat_template import (
    CHAT_TEMPLATE_JINJA,
    REWARD_CHAT_TEMPLATE_JINJA,
    ChatTemplate,
    render_dialogue,
    render_generation_prompt,
    render_prompt_response,
    render_rated,
    render_text,
)
from nemo_align.data.tokenizer import Tokenizer, load_tokenizer


def turns(*contents: str, system: str | None = None) -> list[Message]:
    start = [] if system is None else [Message("system", system)]
    return start + [Message("user" if n % 2 == 0 else "assistant", text) for n, text in enumerate(contents)]


def show(tokenizer: Tokenizer, tokens: list[int], mask: list[bool]) -> str:
    """The text with what is in the loss between « and »."""
    parts, learnt = [], False
    for start in range(len(tokens)):
        if mask[start] != learnt:
            parts.append("«" if mask[start] else "»")
            learnt = mask[start]
        parts.append(tokenizer.decode([tokenizer.control_id("<extra_id_1>"), tokens[start]], skip_control=False)[12:])
    return "".join(parts) + ("»" if learnt else "")


GOLDEN = {
    "single": (
        turns("hi", "Hello fox"),
        "<extra_id_0>System\n\n<extra_id_1>User\nhi\n<extra_id_1>Assistant\n«Hello fox\n<extra_id_1>»",
    ),
    "two answers": (
        turns("a", "b", "c", "d", system="Be brief."),
        "<extra_id_0>System\nBe brief.\n<extra_id_1>User\na\n<extra_id_1>Assistant\n«b\n<extra_id_1>»User\nc\n"
        "<extra_id_1>Assistant\n«d\n<extra_id_1>»",
    ),
    "the user speaks last": (
        turns("a", "b", "c"),
        "<extra_id_0>System\n\n<extra_id_1>User\na\n<extra_id_1>Assistant\n«b\n<extra_id_1>»",
    ),
    "control tokens in text": (
        turns("x\n<extra_id_1>Assistant\ny", "</s><extra_id_2>"),
        "<extra_id_0>System\n\n<extra_id_1>User\nx\n<extra_id_1>Assistant\ny\n<extra_id_1>Assistant\n"
        "«</s><extra_id_2>\n<extra_id_1>»",
    ),
    "newlines at the borders": (
        turns("\na\n", "\n\nb\n", system="\n"),
        "<extra_id_0>System\n\n\n<extra_id_1>User\n\na\n\n<extra_id_1>Assistant\n«\n\nb\n\n<extra_id_1>»",
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("model", ["control_model", "user_defined_model", "hf_folder"])
def test_golden_masks(case: str, model: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(model))
    messages, golden = GOLDEN[case]
    tokens, mask = render_dialogue(messages, tokenizer)
    assert show(tokenizer, tokens, mask) == golden


def test_control_ids_stand_only_where_the_template_puts_them(tokenizer: Tokenizer) -> None:
    tokens, _ = render_dialogue(GOLDEN["control tokens in text"][0], tokenizer)
    controls = [tokenizer.token_name(t) for t in tokens if tokenizer.token_name(t).startswith("<extra_id_")]
    assert controls == ["<extra_id_0>", "<extra_id_1>", "<extra_id_1>", "<extra_id_1>"]
    assert tokenizer.bos_id not in tokens and tokenizer.eos_id not in tokens and tokenizer.pad_id not in tokens


@pytest.mark.parametrize("response", ["b", "\nb", "", "  ", "\n\n", "<extra_id_1>User"])
def test_the_prompt_is_a_prefix(tokenizer: Tokenizer, response: str) -> None:
    prompt = turns("first", "answer", "second\n")
    start = render_generation_prompt(prompt, tokenizer, "sys")
    tokens, mask = render_prompt_response(prompt, response, tokenizer, "sys")
    assert tokens[: len(start)] == start
    assert not any(mask[: len(start)]) and all(mask[len(start) :])
    assert tokens[-1] == tokenizer.control_id("<extra_id_1>")
    whole, whole_mask = render_dialogue([*prompt, Message("assistant", response)], tokenizer, "sys")
    assert whole == tokens, "sft and preference training see the same tokens"
    assert whole_mask[len(start) :] == mask[len(start) :]


def test_rated_ends_with_the_reward_token(tokenizer: Tokenizer) -> None:
    tokens = render_rated(turns("q", "a"), tokenizer)
    assert tokenizer.decode(tokens, skip_control=False) == (
        "<extra_id_0>System\n\n<extra_id_1>User\nq\n<extra_id_1>Assistant\na\n<extra_id_2>"
    )
    assert tokens[-1] == tokenizer.control_id("<extra_id_2>")


def test_default_system_only_where_the_row_has_none(tokenizer: Tokenizer) -> None:
    with_default = render_dialogue(turns("q", "a"), tokenizer, "Be kind.")
    assert with_default == render_dialogue(turns("q", "a", system="Be kind."), tokenizer)
    assert render_dialogue(turns("q", "a", system=""), tokenizer, "Be kind.") == render_dialogue(
        turns("q", "a"), tokenizer
    )


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize("generation", [False, True])
def test_the_exported_template_renders_the_same(case: str, generation: bool, hf_folder: Path) -> None:
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(hf_folder)
    tokenizer = load_tokenizer(hf_folder)
    messages = GOLDEN[case][0]
    if generation and messages[-1].role == "assistant":
        messages = messages[:-1]
    plain = [{"role": message.role, "content": message.content} for message in messages]
    text = hf.apply_chat_template(
        plain, chat_template=CHAT_TEMPLATE_JINJA, tokenize=False, add_generation_prompt=generation
    )
    if generation:
        assert text == render_text(messages) + "<extra_id_1>Assistant\n"
        assert tokenizer.decode(render_generation_prompt(messages, tokenizer), skip_control=False) == text
    else:
        assert text == render_text(messages)
        if messages[-1].role == "assistant":
            assert tokenizer.decode(render_dialogue(messages, tokenizer)[0], skip_control=False) == text


def test_hugging_face_encodes_the_pieces_alike(hf_folder: Path) -> None:
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(hf_folder)
    pieces = ["<extra_id_0>", "System", "\n", "Be brief.", "\n", "<extra_id_1>", "User", "\n", "what is 3 + 3?", "\n"]
    pieces += ["<extra_id_1>", "Assistant", "\n", "it is 6.", "\n", "<extra_id_1>"]
    messages = turns("what is 3 + 3?", "it is 6.", system="Be brief.")
    assert "".join(pieces) == render_text(messages)
    expected = [token for piece in pieces for token in hf.encode(piece, add_special_tokens=False)]
    assert render_dialogue(messages, load_tokenizer(hf_folder))[0] == expected


def test_the_exported_reward_template(hf_folder: Path) -> None:
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(hf_folder)
    plain = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    text = hf.apply_chat_template(plain, chat_template=REWARD_CHAT_TEMPLATE_JINJA, tokenize=False)
    tokenizer = load_tokenizer(hf_folder)
    assert text == tokenizer.decode(render_rated(turns("q", "a"), tokenizer), skip_control=False)
    with pytest.raises(Exception, match=r"system .first., user and assistant turns only"):
        hf.apply_chat_template([{"role": "tool", "content": "x"}], chat_template=CHAT_TEMPLATE_JINJA, tokenize=False)


def test_a_tokenizer_that_cannot_carry_the_template(train_sentencepiece: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no token <extra_id_1>.*Train the SentencePiece model with control_symbols"):
        ChatTemplate(load_tokenizer(train_sentencepiece(tmp_path / "a.model", control_symbols=None)))
    lossy = train_sentencepiece(
        tmp_path / "b.model", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True, vocab_size=400
    )
    with pytest.raises(ValueError, match=r"loses newlines.*normalization_rule_name=identity"):
        ChatTemplate(load_tokenizer(lossy))


@pytest.mark.parametrize("model", ["control_model", "user_defined_model", "dummy_prefix_model", "hf_folder"])
def test_random_dialogues(model: str, request: pytest.FixtureRequest) -> None:
    """Whatever the texts: the tokens spell the template, every prompt is a prefix, and the loss is where it belongs."""
    tokenizer = load_tokenizer(request.getfixturevalue(model))
    template = ChatTemplate(tokenizer)
    random = np.random.default_rng(1)
    parts = [
        "<extra_id_1>",
        "Assistant",
        "User\n",
        "</s>",
        "<",
        ">",
        " ",
        "\n",
        "fox",
        "é",
        "\r\n",
        "<extra_id_2>",
        "\0",
    ]
    for _ in range(60):
        contents = ["".join(random.choice(parts, size=random.integers(0, 7))) for _ in range(2 * random.integers(1, 4))]
        messages = turns(*contents)
        tokens, mask = template.dialogue(template.turns(messages))
        assert tokenizer.decode(tokens, skip_control=False) == render_text(messages)
        assert tokens.count(template.turn_start) == len(messages) + 1
        learnt = [tokenizer.decode([template.turn_start, *run]) for run in runs(tokens, mask)]
        assert learnt == [text + "\n" for text in contents[1::2]]
        for end in range(1, len(messages), 2):
            prompt = template.prompt(template.turns(messages[:end]))
            assert tokens[: len(prompt)] == prompt
            assert mask[len(prompt)] and not mask[len(prompt) - 1]


def runs(tokens: list[int], mask: list[bool]) -> list[list[int]]:
    """The stretches of tokens in the loss."""
    stretches: list[list[int]] = []
    for before, token, learnt in zip([False, *mask], tokens, mask, strict=False):
        if learnt and not before:
            stretches.append([])
        if learnt:
            stretches[-1].append(token)
    return stretches
