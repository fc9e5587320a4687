"""From text files to the `.bin`/`.idx` pair that pretraining reads."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_align.data.indexed import IndexedDatasetInfo, write_indexed_dataset

if TYPE_CHECKING:
    from nemo_align.data.tokenizer import Tokenizer

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")


def prepare_pretraining(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    prefix: str | Path,
    *,
    text_key: str = "text",
    append_eod: bool = True,
) -> IndexedDatasetInfo:
    """Tokenize every document of `inputs` in order and write `<prefix>.bin` and `<prefix>.idx`.

    Inputs: .jsonl or .jsonl.gz (a document per line, under `text_key`), .parquet (a document per row, in that column),
    .txt (one document per file, UTF-8). Each document ends with the tokenizer's end-of-document token, so that the
    model learns where texts end, unless `append_eod` is off. ValueError names the file and line of what cannot be read.
    """
    documents = (tokenizer.encode_text(text) for text in read_texts(inputs, text_key))
    return write_indexed_dataset(prefix, documents, tokenizer.vocab_size, tokenizer.eod if append_eod else None)


def read_texts(inputs: Iterable[str | Path], text_key: str = "text") -> Iterator[str]:
    """The documents of all files, in order; one at a time, so files may be larger than memory."""
    for path in map(Path, inputs):
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _jsonl(path, text_key)
        elif path.suffix == ".parquet":
            yield from _parquet(path, text_key)
        elif path.suffix == ".txt":
            yield _decode(path.read_bytes(), str(path))
        else:
            raise ValueError(f"{path}: documents are read from {', '.join(SUFFIXES)}")


def _jsonl(path: Path, text_key: str) -> Iterator[str]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(_decode(line, where))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: no JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(row, dict) or text_key not in row:
                keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                raise ValueError(f"{where}: no key {text_key!r} (found: {keys}); name it with text_key")
            yield _text(row[text_key], where, text_key)


def _parquet(path: Path, text_key: str) -> Iterator[str]:
    import pyarrow.parquet  # comes with datasets; only this branch needs it

    file = pyarrow.parquet.ParquetFile(path)
    names = file.schema_arrow.names
    if text_key not in names:
        raise ValueError(f"{path}: no column {text_key!r} (found: {', '.join(names)}); name it with text_key")
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield _text(value, f"{path}, row {number}", text_key)


def _text(value: object, where: str, text_key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {text_key!r} is {type(value).__name__}, not text")
    return value


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start}); convert the file") from error
