"""The quickstart's tokenizer: SentencePiece as Nemotron-4 uses it (arXiv 2402.16819, section 2), with 8,192 pieces."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

VOCAB_SIZE = 8192
NUM_EXTRA_IDS = 8  # 0 system turn, 1 turn, 2 reward; the last pads; the others are spare
_CONTROL = [f"<extra_id_{index}>" for index in range(NUM_EXTRA_IDS)]


def train_tokenizer(texts: Iterable[str], path: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Byte-pair encoding with single digits, all whitespace kept, and bytes for what the vocabulary lacks.

    Text is never changed, so decoding gives it back exactly. The `<extra_id_*>` are control symbols: no text encodes
    to them. Newlines and tabs are pieces of their own and never merge with what follows."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.9995,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        control_symbols=_CONTROL,
        user_defined_symbols=["\n", "\t"],
        unk_id=0,
        pad_id=1,
        bos_id=2,
        eos_id=3,
        max_sentence_length=1 << 20,
        num_threads=max(1, os.cpu_count() or 1),
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
