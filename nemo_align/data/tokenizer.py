"""Tokenizers: a SentencePiece model, or a Hugging Face folder with a fast tokenizer. One interface.

Text and control tokens never mix: `encode_text` and `encode_continuation` turn any string into text pieces, also one
that spells `<extra_id_1>` or `</s>`, so no row can open a turn; control ids come from `control_id` alone.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

SENTENCEPIECE_FILE = "tokenizer.model"
OUR_CONFIG = "nemo_align_tokenizer.json"  # marks a folder written by SentencePieceTokenizer.save
EXTRA_ID = re.compile(r"<extra_id_(\d+)>")
FIRST_SPARE_EXTRA_ID = 3  # the Nemotron template uses 0 to 2


class Tokenizer(ABC):
    """What the data room, Megatron's GPTDataset and the checkpoints need of a tokenizer.

    `eos_id` ends a pretraining document: the model's own, else `</s>` or `<|endoftext|>`, else None.
    `bos_id` is None if there is none; we never insert it (Nemotron-4 adds no BOS).
    `pad_id` never occurs in a rendered text: the model's own padding token if it is none of the others, else the last
    `<extra_id_N>` from 3 on, else BOS. Hugging Face's reward head reads the last token that is not this one.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    fingerprint: str  # of the files that decide every id
    source: str  # where it was loaded from, for messages

    @abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """Ids of a text that stands at the start (with the space some models put before it). No control ids."""

    @abstractmethod
    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows other tokens. No control ids."""

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_control: bool = True) -> str:
        """Text of `ids`; control tokens are left out, or written by name."""

    @abstractmethod
    def find_control_id(self, name: str) -> int | None:
        """Id of the control token `name`, None if the vocabulary lacks it."""

    @abstractmethod
    def token_name(self, token_id: int) -> str:
        """The piece of an id, as the vocabulary spells it."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a folder that `load_tokenizer` reads back to an equal tokenizer."""

    def control_id(self, name: str) -> int:
        """Id of the control token `name`."""
        found = self.find_control_id(name)
        if found is None:
            raise ValueError(
                f"tokenizer {self.source}: no token {name}, which the Nemotron chat template needs. Train the "
                "SentencePiece model with control_symbols=<extra_id_0>,<extra_id_1>,<extra_id_2>, add them to the "
                "Hugging Face tokenizer as special tokens (and rows to the embedding), or use another tokenizer"
            )
        return found

    # What megatron.core.datasets reads of a tokenizer.

    @property
    def eod(self) -> int:
        """End-of-document id of pretraining data."""
        if self.eos_id is None:
            raise ValueError(
                f"tokenizer {self.source}: no end-of-sequence token (</s> or <|endoftext|>) to end documents with"
            )
        return self.eos_id

    @property
    def pad(self) -> int:
        """Padding id, by the name that Megatron uses."""
        return self.pad_id

    @property
    def unique_identifiers(self) -> OrderedDict[str, str]:
        """Goes into the cache key of Megatron's sample indices."""
        return OrderedDict(tokenizer=type(self).__name__, fingerprint=self.fingerprint)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A SentencePiece `.model` file, a folder that holds `tokenizer.model`, or a Hugging Face tokenizer folder.

    A folder with Hugging Face's files is read by them unless we wrote it: its ids may go beyond tokenizer.model.
    """
    from nemo_align.data.tokenizer_huggingface import HuggingFaceTokenizer
    from nemo_align.data.tokenizer_sentencepiece import SentencePieceTokenizer

    path = Path(path)
    if path.is_file():
        if path.name in ("tokenizer.json", "tokenizer_config.json"):
            return HuggingFaceTokenizer(path.parent)
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        raise ValueError(f"data.tokenizer: {path} does not exist (a SentencePiece .model file or a tokenizer folder)")
    model = path / SENTENCEPIECE_FILE
    if (path / OUR_CONFIG).is_file():
        stored = json.loads((path / OUR_CONFIG).read_text(encoding="utf-8"))
        tokenizer = SentencePieceTokenizer(model)
        if stored["fingerprint"] != tokenizer.fingerprint:
            raise ValueError(
                f"{model}: not the file that {OUR_CONFIG} beside it was written for; copy the folder again"
            )
        return tokenizer
    if (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file():
        return HuggingFaceTokenizer(path)
    if model.is_file():
        return SentencePieceTokenizer(model)
    raise ValueError(
        f"data.tokenizer: {path} holds neither {SENTENCEPIECE_FILE} nor tokenizer.json. Files there: "
        f"{', '.join(sorted(file.name for file in path.iterdir())[:20]) or 'none'}"
    )


def choose_pad_id(
    own: int | None, control_ids: dict[str, int], *, taken: set[int], bos_id: int | None, source: str
) -> int:
    """The padding id by the rule in `Tokenizer`; `control_ids` are the vocabulary's control tokens."""
    if own is not None and own not in taken:
        return own
    spare = {
        int(match.group(1)): token_id
        for name, token_id in control_ids.items()
        if (match := EXTRA_ID.fullmatch(name)) and int(match.group(1)) >= FIRST_SPARE_EXTRA_ID
    }
    if spare:
        return spare[max(spare)]
    if bos_id is not None:
        return bos_id
    raise ValueError(
        f"tokenizer {source}: no token to pad with that no text has; add <pad> or <extra_id_3> as control token"
    )


def split_at_control(ids: Sequence[int], control: frozenset[int]) -> list[tuple[bool, list[int]]]:
    """Runs of (is control, ids)."""
    return [(is_control, list(run)) for is_control, run in groupby(ids, key=lambda token_id: token_id in control)]
