"""From text to the `.bin`/`.idx` pair that pretraining reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_align.config.data import RowsConfig
from nemo_align.data.chat import RowError, column_names
from nemo_align.data.indexed import IndexedDatasetInfo, write_indexed_dataset
from nemo_align.data.row_formats.fields import encodable
from nemo_align.data.rows import read_rows

if TYPE_CHECKING:
    from nemo_align.data.tokenizer import Tokenizer


def prepare_pretraining(
    inputs: Sequence[str | Path],
    tokenizer: Tokenizer,
    prefix: str | Path,
    *,
    text_key: str = "text",
    append_eod: bool = True,
) -> IndexedDatasetInfo:
    """Tokenize every document of `inputs` in order and write `<prefix>.bin` and `<prefix>.idx`.

    Inputs: .txt (one document per file, UTF-8), or rows with a document under `text_key` (JSON Lines, parquet and all
    else that `data.rows` reads). Each document ends with the tokenizer's end-of-document token, so that the model
    learns where texts end, unless `append_eod` is off. ValueError names the file and line of what cannot be read.
    """
    documents = (tokenizer.encode_text(text) for text in read_texts(inputs, text_key))
    return write_indexed_dataset(prefix, documents, tokenizer.vocab_size, tokenizer.eod if append_eod else None)


def read_texts(inputs: Iterable[str | Path], text_key: str = "text") -> Iterator[str]:
    """The documents of all inputs, in order; one at a time, so that files may be larger than memory."""
    for path in map(Path, inputs):
        if path.suffix == ".txt":
            yield _whole_file(path)
            continue
        for row in read_rows(RowsConfig(path=str(path)), seed=0):
            if text_key not in row.record:
                found = column_names(list(row.record)) or "none"
                raise ValueError(f"{row.where}: no key {text_key!r} (found: {found}); name the right one with text_key")
            text = row.record[text_key]
            if not isinstance(text, str):
                raise ValueError(
                    f"{row.where}: {text_key!r} is {type(text).__name__}, not text; correct or remove the row"
                )
            try:
                yield encodable(text, text_key)
            except RowError as error:
                raise ValueError(f"{row.where}: {error}") from error


def _whole_file(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name files of text or of rows")
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}); check the file and its permissions") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); convert the file") from error
