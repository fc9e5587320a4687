"""Pretraining pairs that are cut off or damaged: refused by name, without an allocation of the size that they claim."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from nemo_align.data.indexed import check_indexed_dataset, write_indexed_dataset
from nemo_align.data.prepare_pretraining import prepare_pretraining
from nemo_align.data.tokenizer import Tokenizer
from tests.bad_input_tally import tried
from tests.unit.data.test_bad_files import refused


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    write_indexed_dataset(tmp_path / "set", [[3, 4, 5], [6, 7]], vocab_size=10, eod=2)
    return tmp_path / "set"


HEAD = struct.Struct("<9sQBQQ")


@pytest.mark.parametrize(
    ("sequences", "documents"),
    [(2**63, 3), (2**64 - 1, 2**64 - 1), (2**40, 2**40), (2, 0), (0, 3), (0, 0), (1, 3), (3, 3), (2, 2**62)],
)
def test_absurd_counts_in_an_index(sequences: int, documents: int, pair: Path) -> None:
    """Refused by arithmetic on the file's size: nothing of the size that it claims is allocated."""
    index = pair.with_suffix(".idx")
    content = index.read_bytes()
    magic, version, dtype, *_ = HEAD.unpack(content[: HEAD.size])
    index.write_bytes(HEAD.pack(magic, version, dtype, sequences, documents) + content[HEAD.size :])
    tracemalloc.start()
    said = refused(lambda: check_indexed_dataset(pair, vocab_size=10))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert said.startswith(str(pair)) and peak < 1_000_000
    # A file of just the size that the counts ask for, as far as such a file can be.
    size = HEAD.size + 12 * sequences + 8 * documents
    if size < 1 << 20:
        index.write_bytes(HEAD.pack(magic, version, dtype, sequences, documents) + bytes(size - HEAD.size))
        assert refused(lambda: check_indexed_dataset(pair, vocab_size=10)).startswith(str(pair))


def test_damaged_pairs(pair: Path) -> None:
    contents = {suffix: pair.with_suffix(suffix).read_bytes() for suffix in (".bin", ".idx")}
    generator = np.random.default_rng(0)
    for suffix, content in contents.items():
        for cut in range(len(content)):
            pair.with_suffix(suffix).write_bytes(content[:cut])
            assert refused(lambda: check_indexed_dataset(pair, vocab_size=10)).startswith(str(pair))
        pair.with_suffix(suffix).write_bytes(content)
    for _ in range(300):  # bytes of the index changed: refused, or the same documents as before
        changed = bytearray(contents[".idx"])
        for position in generator.integers(0, len(changed), 2):
            changed[position] ^= int(generator.integers(1, 256))
        pair.with_suffix(".idx").write_bytes(changed)
        tried["files"] += 1
        try:
            info = check_indexed_dataset(pair, vocab_size=10)
        except ValueError as error:
            if not str(error).startswith(str(pair)):
                raise
        else:
            assert (info.num_tokens, info.num_sequences) == (7, 2)
    pair.with_suffix(".idx").write_bytes(contents[".idx"])
    assert "has id 7, but the vocabulary has 7 tokens" in refused(lambda: check_indexed_dataset(pair, vocab_size=7))


def test_texts_that_cannot_be_prepared(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    for line, message in (
        (b'{"text": "\\ud800"}', ":1: text: half a character"),
        (b'{"text": 5}', ":1: 'text' is int"),
        (b'{"other": "x"}', ":1: no key 'text' (found: other)"),
        (b"{", ":1: not valid JSON"),
        (b"", "there are no documents"),
    ):
        path.write_bytes(line)
        assert message in refused(lambda: prepare_pretraining([path], tokenizer, tmp_path / "out"))
        assert not list(tmp_path.glob("out*"))
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert "a.txt: not UTF-8 (byte 3)" in refused(
        lambda: prepare_pretraining([tmp_path / "a.txt"], tokenizer, tmp_path / "out")
    )
