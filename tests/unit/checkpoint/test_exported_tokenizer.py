"""The fast tokenizer of an export gives SentencePiece's ids, and the chat template ours."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import sentencepiece

from nemo_align.checkpoint.huggingface.generation_config import generation_config
from nemo_align.checkpoint.huggingface.tokenizer_files import write_tokenizer
from nemo_align.data.chat import Message
from nemo_align.data.chat_template import render_dialogue, render_rated
from nemo_align.data.tokenizer import load_tokenizer

TEXT = [
    f"The {word} fox number {number} jumps over {number * 7} lazy dogs, isn't it?"
    for word in ("quick", "brown", "sly")
    for number in range(60)
] + ["def add(a, b):\n    return a + b", "äöü ß é 日本"] * 9
CONTROLS = [f"<extra_id_{number}>" for number in range(5)]
MODELS = {
    "bpe": {},
    "bpe_prefix": {"add_dummy_prefix": True},
    "bpe_squeezing": {
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": True,
        "normalization_rule_name": "nmt_nfkc",
    },
    "bpe_user_defined": {"control_symbols": None, "user_defined_symbols": [*CONTROLS, "▁▁", "▁▁▁▁", "<div>"]},
    "unigram": {"model_type": "unigram"},
}


def train(folder: Path, changes: dict) -> Path:
    settings = {
        "vocab_size": 420,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "control_symbols": CONTROLS,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    } | changes
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        **{key: value for key, value in settings.items() if value is not None},
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return folder


def texts(*, leading_spaces: bool) -> list[str]:
    generator = random.Random(0)
    noise = ["".join(generator.choice("abc  \n\t<>éÄ日1") for _ in range(40)) for _ in range(300)]
    edges = ["", "x", "a" * 50, "trail   ", "x\n\n  y", "<div>a</div>", "😀", "tab\there", " lead", "    four"]
    found = [*TEXT, *noise, *edges]
    return found if leading_spaces else [text for text in found if not text.startswith(" ")]


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_sentencepiece(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source, target = train(tmp_path / "source", MODELS[name]), tmp_path / "target"
    target.mkdir()
    ours = write_tokenizer(source, target, is_reward=False, max_length=64)
    theirs = AutoTokenizer.from_pretrained(target)
    # "bpe_prefix" and texts that begin with spaces: see fast_tokenizer.
    for text in texts(leading_spaces=name != "bpe_prefix"):
        assert theirs(text)["input_ids"] == ours.encode_text(text), text
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert theirs.pad_token_id == ours.pad_id
    assert theirs.convert_tokens_to_ids(CONTROLS[1]) == ours.control_id(CONTROLS[1])
    assert (
        theirs.decode(theirs(TEXT[0])["input_ids"] + [ours.control_id(CONTROLS[1])], skip_special_tokens=True)
        == TEXT[0]
    )
    assert load_tokenizer(target).vocab_size == ours.vocab_size  # an export serves as data.tokenizer


@pytest.mark.parametrize("is_reward", [False, True])
@pytest.mark.parametrize("name", ["bpe", "bpe_prefix", "bpe_user_defined"])
def test_the_chat_template_gives_our_tokens(name: str, is_reward: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source, target = train(tmp_path / "source", MODELS[name]), tmp_path / "target"
    target.mkdir()
    ours = write_tokenizer(source, target, is_reward=is_reward, max_length=64)
    theirs = AutoTokenizer.from_pretrained(target)
    turns = [("system", "Be brief."), ("user", "Add 1 and 2,\nplease"), ("assistant", "3")]
    found = theirs.apply_chat_template([{"role": role, "content": text} for role, text in turns], return_dict=False)
    messages = [Message(role, text) for role, text in turns]
    assert found == (render_rated(messages, ours) if is_reward else render_dialogue(messages, ours)[0])
    assert theirs.padding_side == ("right" if is_reward else "left")


def test_the_generation_config_keeps_token_0(tmp_path):
    tokenizer = load_tokenizer(train(tmp_path / "t", {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": 2}))
    assert generation_config(tokenizer, "pretrain") == {"eos_token_id": [2], "pad_token_id": 0}
    turn = tokenizer.find_control_id("<extra_id_1>")
    assert generation_config(tokenizer, "sft") == {"eos_token_id": [2, turn], "pad_token_id": 0}
