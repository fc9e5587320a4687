"""Small real tokenizers, trained when the tests run."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece

from nemo_align.data.tokenizer import Tokenizer, load_tokenizer

TEXT = [
    f"The {colour} fox jumps over {number} lazy dogs.\nQuestion: what is {number} + {number}?\nIt is {2 * number}."
    for number in range(60)
    for colour in ("quick", "brown", "small", "happy")
]
TEMPLATE_TOKENS = ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>", "<extra_id_3>"]


def _train_sentencepiece(path: Path, **changes) -> Path:
    """A 430-piece byte-level-safe model; `changes` are trainer settings (None removes one)."""
    settings = {
        "vocab_size": 430,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "control_symbols": TEMPLATE_TOKENS,
        "minloglevel": 2,
        "num_threads": 1,
    } | changes
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        **{name: value for name, value in settings.items() if value is not None},
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def train_sentencepiece() -> Callable[..., Path]:
    """The trainer, for tests that need a model of their own."""
    return _train_sentencepiece


@pytest.fixture(scope="session")
def control_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Template tokens of type CONTROL: never matched in text by SentencePiece itself."""
    return _train_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "control.model")


@pytest.fixture(scope="session")
def user_defined_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Template tokens of type USER_DEFINED, matched in text, beside one that is no control token."""
    path = tmp_path_factory.mktemp("sentencepiece") / "user_defined.model"
    return _train_sentencepiece(
        path, control_symbols=None, user_defined_symbols=[*TEMPLATE_TOKENS, "<|endoftext|>", "\t\t"]
    )


@pytest.fixture(scope="session")
def dummy_prefix_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Puts a space before a text, as Llama's and many others do."""
    return _train_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "prefix.model", add_dummy_prefix=True)


@pytest.fixture(scope="session")
def tokenizer(control_model: Path) -> Tokenizer:
    return load_tokenizer(control_model)


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: byte-level BPE whose template tokens are in two ways special."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.add_special_tokens(["<extra_id_0>", "<extra_id_1>"])
    backend.add_tokens([AddedToken("<extra_id_2>", special=False, normalized=False), "<extra_id_3>", "    "])
    folder = tmp_path_factory.mktemp("huggingface")
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder
