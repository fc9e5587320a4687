"""Megatron's .bin/.idx: writing, reading back by Megatron-core, and refusing what is damaged."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece

from nemo_align.data.indexed import check_indexed_dataset, write_indexed_dataset
from nemo_align.data.prepare_pretraining import prepare_pretraining, read_texts
from nemo_align.data.tokenizer import load_tokenizer

DOCUMENTS = [[5, 6, 7], [], [8], list(range(10, 60))]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_indexed_dataset(tmp_path / "set", DOCUMENTS, vocab_size=100, eod=2)
    return tmp_path / "set"


@pytest.mark.parametrize(("vocab_size", "dtype"), [(100, np.uint16), (65499, np.uint16), (65500, np.int32)])
def test_megatron_reads_what_was_written(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    info = write_indexed_dataset(tmp_path / "set", DOCUMENTS, vocab_size=vocab_size, eod=2)
    dataset = IndexedDataset(str(tmp_path / "set"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[5, 6, 7, 2], [8, 2], [*range(10, 60), 2]]
    assert dataset.index.dtype == dtype == info.dtype.type
    assert (info.num_sequences, info.num_documents, info.num_tokens) == (3, 3, 57)
    assert sorted(os.listdir(tmp_path)) == ["set.bin", "set.idx"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="document 2 has token id 100"):
        write_indexed_dataset(tmp_path / "set", [[1], [99, 100]], vocab_size=100, eod=None)
    with pytest.raises(ValueError, match="no documents"):
        write_indexed_dataset(tmp_path / "set", [[]], vocab_size=100, eod=2)
    assert os.listdir(tmp_path) == []


def _patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def _truncate(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


# 3 sequences: lengths at 34, pointers at 46, document borders at 70
DAMAGE = {
    "missing bin": (lambda p: os.remove(f"{p}.bin"), r"set\.bin: no such file"),
    "missing idx": (lambda p: os.remove(f"{p}.idx"), r"set\.idx: no such file"),
    "other magic": (lambda p: _patch(Path(f"{p}.idx"), 0, b"GARBAGE"), "does not start with MMIDIDX"),
    "version": (lambda p: _patch(Path(f"{p}.idx"), 9, struct.pack("<Q", 7)), "version 7"),
    "float ids": (lambda p: _patch(Path(f"{p}.idx"), 17, b"\x06"), "number format 6"),
    "absurd count": (lambda p: _patch(Path(f"{p}.idx"), 18, struct.pack("<Q", 1 << 60)), "cut off or damaged"),
    "cut idx": (lambda p: _truncate(Path(f"{p}.idx"), 8), "cut off or damaged"),
    "cut bin": (lambda p: _truncate(Path(f"{p}.bin"), 2), "holds 56 tokens, its .idx lists 57"),
    "half a token": (lambda p: _truncate(Path(f"{p}.bin"), 1), "no whole number of uint16"),
    "negative length": (lambda p: _patch(Path(f"{p}.idx"), 34, struct.pack("<i", -4)), "negative length"),
    "pointers": (lambda p: _patch(Path(f"{p}.idx"), 46 + 8, struct.pack("<q", 1 << 50)), "back to back"),
    "documents": (lambda p: _patch(Path(f"{p}.idx"), 70 + 24, struct.pack("<q", 9)), "document borders"),
    "empty bin": (lambda p: _truncate(Path(f"{p}.bin"), 114), "nothing to train on"),
    "foreign id": (
        lambda p: _patch(Path(f"{p}.bin"), 2 * 5, struct.pack("<H", 100)),
        r"token 5 \(sequence 2\) has id 100",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_with_the_file_named(prefix: Path, name: str) -> None:
    check_indexed_dataset(prefix, vocab_size=100)
    damage, message = DAMAGE[name]
    damage(prefix)
    with pytest.raises(ValueError, match=message):
        check_indexed_dataset(prefix, vocab_size=100)


def test_a_suffix_in_the_path_is_explained(prefix: Path) -> None:
    with pytest.raises(ValueError, match="leave the suffix off"):
        check_indexed_dataset(f"{prefix}.bin")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    model = io.BytesIO()
    text = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20), model_writer=model, vocab_size=60, hard_vocab_limit=False,
        control_symbols=["<extra_id_0>", "<extra_id_1>", "<extra_id_2>", "<extra_id_3>"], minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return load_tokenizer(path)


def test_prepare_reads_every_kind_of_file(tmp_path: Path, tokenizer) -> None:
    texts = ["the quick", "brown fox\njumps", "over the", "lazy dog", "pack my box\n\nwith"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": texts[0]}) + "\n\n" + json.dumps({"text": texts[1]}) + "\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": texts[2]}))
    pyarrow.parquet.write_table(pyarrow.table({"text": [texts[3]]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text(texts[4])
    inputs = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt")]
    assert list(read_texts(inputs)) == texts

    from megatron.core.datasets.indexed_dataset import IndexedDataset

    info = prepare_pretraining(inputs, tokenizer, tmp_path / "out" / "set")
    dataset = IndexedDataset(str(tmp_path / "out" / "set"))
    assert info.num_documents == 5
    for number, text in enumerate(texts):
        assert dataset[number].tolist() == [*tokenizer.encode_text(text), tokenizer.eos_id]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a\.jsonl:2: not valid JSON"),
        (b'{"content": "a"}', r"a\.jsonl:2: no key 'text' \(found: content\)"),
        (b'{"text": 5}', r"a\.jsonl:2: 'text' is int"),
        (b'["text"]', r"a\.jsonl:2: expected a JSON object, found list"),
        (b'{"text": "\xff"}', r"a\.jsonl:2: not UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        list(read_texts([tmp_path / "a.jsonl"]))
