"""SentencePiece models, the kind Nemotron-4 uses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from nemo_align.data.sentencepiece_model import controls_never_in_text, without_dummy_prefix
from nemo_align.data.tokenizer import (
    OUR_CONFIG,
    SENTENCEPIECE_FILE,
    Tokenizer,
    choose_pad_id,
    split_at_control,
)


class SentencePieceTokenizer(Tokenizer):
    """One `.model` file. Byte fallback and an identity normaliser make text exact; others lose what they map away."""

    def __init__(self, model_file: Path) -> None:
        self.source = str(model_file)
        if not model_file.is_file():
            raise ValueError(f"data.tokenizer: {model_file} does not exist")
        self._model = model_file.read_bytes()
        try:
            text_model = controls_never_in_text(self._model)
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self._model)
            # An empty file is read without a word up to here.
            self._text = sentencepiece.SentencePieceProcessor(model_proto=text_model)
            self._continuation = sentencepiece.SentencePieceProcessor(model_proto=without_dummy_prefix(text_model))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"data.tokenizer: {model_file} is not a SentencePiece model ({error})") from error
        self.vocab_size = self._pieces.vocab_size()
        self.fingerprint = hashlib.blake2b(self._model, digest_size=16).hexdigest()
        self._control_ids = {
            self._pieces.id_to_piece(token_id): token_id
            for token_id in range(self.vocab_size)
            if self._text.is_control(token_id)
        }
        self._control = frozenset(self._control_ids.values())
        self.bos_id = _found(self._pieces.bos_id())
        self.eos_id = _found(self._pieces.eos_id())
        for name in ("</s>", "<|endoftext|>"):
            if self.eos_id is None:
                self.eos_id = self._control_ids.get(name)
        taken = {self._pieces.unk_id(), self.eos_id} | {self._control_ids.get(f"<extra_id_{n}>") for n in range(3)}
        self.pad_id = choose_pad_id(
            _found(self._pieces.pad_id()), self._control_ids, taken=taken, bos_id=self.bos_id, source=self.source
        )

    def encode_text(self, text: str) -> list[int]:
        return self._text.encode(text)

    def encode_continuation(self, text: str) -> list[int]:
        return self._continuation.encode(text)

    def decode(self, ids: Sequence[int], *, skip_control: bool = True) -> str:
        parts = []
        # Only a text at the very start has the model's extra space, which decoding takes away again.
        processor = self._text
        for is_control, run in split_at_control([int(token_id) for token_id in ids], self._control):
            if not is_control:
                parts.append(processor.decode(run))
            elif not skip_control:
                parts.extend(self._pieces.id_to_piece(token_id) for token_id in run)
            processor = self._continuation
        return "".join(parts)

    def find_control_id(self, name: str) -> int | None:
        return self._control_ids.get(name)

    def token_name(self, token_id: int) -> str:
        return self._pieces.id_to_piece(int(token_id))

    def save(self, folder: Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SENTENCEPIECE_FILE).write_bytes(self._model)
        config = {
            "kind": "sentencepiece",
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
            "control": dict(sorted(self._control_ids.items(), key=lambda item: item[1])),
        }
        (folder / OUR_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _found(token_id: int) -> int | None:
    return token_id if token_id >= 0 else None
