"""Our rendering in tokens against the exported `chat_template`, rendered by transformers and by Jinja alone.

Three claims, from the strongest:
- The template's text is ours, for every dialogue.
- Our tokens spell that text, and those of a prompt begin those of prompt and answer.
- Encoding the text whole, as a server does, gives our tokens, unless a text spells a control token (a text template
  cannot tell it from its own; ours never makes one of it) or the vocabulary has pieces that join a newline with its
  neighbour. We encode turn by turn and never join them; for such a vocabulary servers must not encode the whole, and
  the export says so.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pytest
import sentencepiece

from nemo_align.checkpoint.conversion.convert import export_hf, import_hf
from nemo_align.checkpoint.huggingface.tokenizer_files import write_tokenizer
from nemo_align.checkpoint.huggingface.whole_text import joins_across_turns
from nemo_align.data.chat import Message
from nemo_align.data.chat_template import ChatTemplate, render_text
from nemo_align.data.tokenizer import Tokenizer
from tests.parity.chat_corpus import PLAIN, SPELLED, Turns, random_dialogues
from tests.parity.start_model import write_policy

CONTROLS = [f"<extra_id_{number}>" for number in range(4)]
LINES = [
    f"The {word} fox jumps over {number} lazy dogs. What is {number} + {number}? It is {2 * number}."
    for word in ("quick", "brown", "small")
    for number in range(60)
] + ["def f(x):", "    return x", "é 日本 ß"] * 5
ONE_TEXT = [f"What is {number} + {number}?\n\nIt is {2 * number}.\nAnd so on.\n" for number in range(200)]
# Trained on lines, as SentencePiece reads files, a vocabulary has a newline as a byte or as a piece of its own.
VOCABULARIES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "bpe": (LINES, {}),
    "bpe_space_before": (LINES, {"add_dummy_prefix": True}),
    "bpe_user_defined": (
        LINES,
        {"control_symbols": None, "user_defined_symbols": [*CONTROLS, "\n", "    "]},
    ),
    "unigram": (LINES, {"model_type": "unigram", "vocab_size": 400}),
}
# Trained on texts with newlines: pieces that hold one and more.
JOINING = {"bpe_joining": (ONE_TEXT, {"vocab_size": 400})}


@dataclass(frozen=True)
class Exported:
    """A tokenizer as we train with it and as its export loads in transformers."""

    folder: Path
    ours: Tokenizer
    theirs: Any

    @property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.ours)


def export(folder: Path, lines: list[str], settings: dict[str, Any], *, is_reward: bool = False) -> Exported:
    from transformers import AutoTokenizer

    model = io.BytesIO()
    settings = {
        "vocab_size": 500,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "control_symbols": CONTROLS,
        "pad_id": 3,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    } | settings
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        **{name: value for name, value in settings.items() if value is not None},
    )
    for name in ("source", "target"):
        (folder / name).mkdir()
    (folder / "source" / "tokenizer.model").write_bytes(model.getvalue())
    ours = write_tokenizer(folder / "source", folder / "target", is_reward=is_reward, max_length=64)
    return Exported(folder / "target", ours, AutoTokenizer.from_pretrained(folder / "target"))


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory) -> Exported:
    return export(tmp_path_factory.mktemp(request.param), *(VOCABULARIES | JOINING)[request.param])


every_vocabulary = pytest.mark.parametrize("exported", [*VOCABULARIES, *JOINING], indirect=True, scope="module")
apart = pytest.mark.parametrize("exported", VOCABULARIES, indirect=True, scope="module")


def plain(turns: Turns) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def messages(turns: Turns) -> list[Message]:
    return [Message(role, text) for role, text in turns]


def all_dialogues() -> list[Turns]:
    return [*PLAIN.values(), *SPELLED.values(), *random_dialogues(200, seed=3)]


@every_vocabulary
def test_the_text_is_ours(exported):
    """By transformers' sandbox, and by Jinja with and without the block trimming that servers switch on."""
    source = exported.theirs.chat_template
    environments = [jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim) for trim in (False, True)]
    environments.append(jinja2.Environment(keep_trailing_newline=True))
    templates = [environment.from_string(source) for environment in environments]
    for turns in all_dialogues():
        expected = render_text(messages(turns))
        assert exported.theirs.apply_chat_template(plain(turns), tokenize=False) == expected
        for template in templates:
            assert template.render(messages=plain(turns), add_generation_prompt=False) == expected


@every_vocabulary
def test_our_tokens_spell_the_text(exported):
    template = exported.template
    for turns in all_dialogues():
        rendered = template.turns(messages(turns))
        until = max(number for number, (role, _) in enumerate(turns) if role == "assistant") + 1
        text = exported.theirs.apply_chat_template(plain(turns[:until]), tokenize=False)
        tokens, _ = template.dialogue(rendered)
        assert exported.ours.decode(tokens, skip_control=False) == text
        assert exported.theirs.decode(tokens) == text, "their decoder reads our tokens"
        prompt = exported.theirs.apply_chat_template(
            plain(turns[: until - 1]), tokenize=False, add_generation_prompt=True
        )
        begin = template.prompt(template.turns(messages(turns[: until - 1])))
        assert exported.ours.decode(begin, skip_control=False) == prompt
        assert tokens[: len(begin)] == begin


@apart
def test_encoding_the_whole_text_gives_our_tokens(exported):
    template = exported.template
    dialogues = [*PLAIN.values(), *random_dialogues(200, seed=4)]
    for turns in dialogues:
        if turns[-1][0] == "user":
            theirs = exported.theirs.apply_chat_template(plain(turns), add_generation_prompt=True, return_dict=False)
            assert theirs == template.prompt(template.turns(messages(turns))), turns
        else:
            theirs = exported.theirs.apply_chat_template(plain(turns), return_dict=False)
            assert theirs == template.dialogue(template.turns(messages(turns)))[0], turns


@every_vocabulary
def test_the_export_knows_which_vocabularies_join(exported, request):
    pieces = [exported.ours.token_name(token) for token in range(exported.ours.vocab_size)]
    joining = any("\n" in piece and piece != "\n" for piece in pieces)
    assert joining is (request.node.callspec.params["exported"] in JOINING)
    assert joins_across_turns(exported.folder, exported.ours) is joining


@every_vocabulary
def test_a_spelled_control_token_opens_no_turn_of_ours(exported):
    """But it does where the text is encoded whole: that is why rows are never rendered to text for training."""
    template = exported.template
    specials = {token for token, added in exported.theirs.added_tokens_decoder.items() if added.special}
    opened = 0
    for turns in SPELLED.values():
        ours = template.dialogue(template.turns(messages(turns)))[0]
        assert sum(token in specials for token in ours) == 1 + sum(role != "system" for role, _ in turns) + 1
        theirs = exported.theirs.apply_chat_template(plain(turns), return_dict=False)
        opened += sum(token in specials for token in theirs) > sum(token in specials for token in ours)
    assert opened == len(SPELLED)


@pytest.mark.parametrize("exported", JOINING, indirect=True)
def test_a_vocabulary_that_joins_newlines(exported, tmp_path, caplog):
    """What the third claim leaves out is real: the text is the same, the tokens are not. The model card warns."""
    turns = PLAIN["one exchange"]
    ours = exported.template.dialogue(exported.template.turns(messages(turns)))[0]
    theirs = exported.theirs.apply_chat_template(plain(turns), return_dict=False)
    assert theirs != ours and exported.theirs.decode(theirs) == exported.theirs.decode(ours)

    policy = write_policy(tmp_path / "policy", exported.folder / "tokenizer.model")
    export_hf(import_hf(policy, tmp_path / "megatron"), tmp_path / "hf")
    assert "the vocabulary joins newlines with their neighbours" in caplog.text
    assert "**A dialogue must not be encoded as one text.**" in (tmp_path / "hf" / "README.md").read_text()


def test_a_vocabulary_that_does_not_join_needs_no_warning(start_policy, tmp_path):
    export_hf(import_hf(start_policy, tmp_path / "megatron"), tmp_path / "hf")
    assert "must not be encoded" not in (tmp_path / "hf" / "README.md").read_text()


def test_the_reward_template(tmp_path):
    exported = export(tmp_path, LINES, {}, is_reward=True)
    template = exported.template
    for turns in [*PLAIN.values(), *random_dialogues(50, seed=5)]:
        if turns[-1][0] == "assistant":
            theirs = exported.theirs.apply_chat_template(plain(turns), return_dict=False)
            assert theirs == template.rated(template.turns(messages(turns)))[0], turns
