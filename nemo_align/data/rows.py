"""Rows from disk, one at a time, each with the place it came from.

JSON Lines and JSON arrays (either may be gzipped), parquet, and folders written by `datasets.save_to_disk`. JSON files
are told apart by their first character, as many `.json` files are JSON Lines and the other way round.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from nemo_align.config.data import RowsConfig

_BOM = b"\xef\xbb\xbf"
_PARQUET_BATCH_ROWS = 1024
_LOADERS = ".jsonl, .jsonl.gz, .json, .json.gz, .parquet or a folder written by datasets.save_to_disk"


@dataclass(frozen=True)
class Row:
    """One row. `number` counts rows from 1; `where` is `file:line` for JSON Lines, else `file: row n`."""

    record: dict[str, Any]
    number: int
    where: str


def read_rows(config: RowsConfig, *, seed: int) -> Iterator[Row]:
    """The rows of one source, in file order; with max_rows or fraction a seeded choice of them."""
    chosen = choose_rows(config, seed=seed)
    for row in _all_rows(Path(config.path)):
        if chosen is None or row.number in chosen:
            yield row


def choose_rows(config: RowsConfig, *, seed: int) -> frozenset[int] | None:
    """Row numbers that max_rows and fraction leave, None for all.

    Rows are ranked by a hash of seed and number: the same on every machine and numpy version, and a smaller choice is
    part of a larger one.
    """
    if config.fraction is None and config.max_rows is None:
        return None
    if config.fraction is not None and not 0 < config.fraction <= 1:
        raise ValueError(f"fraction {config.fraction} of {config.path}: must be above 0 and at most 1")
    if config.max_rows is not None and config.max_rows < 1:
        raise ValueError(f"max_rows {config.max_rows} of {config.path}: must be at least 1")
    total = sum(1 for _ in _all_rows(Path(config.path)))
    keep = total if config.fraction is None else max(1, round(total * config.fraction))
    keep = keep if config.max_rows is None else min(keep, config.max_rows)

    def rank(number: int) -> bytes:
        return hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()

    return frozenset(sorted(range(1, total + 1), key=rank)[:keep])


def _all_rows(path: Path) -> Iterator[Row]:
    try:
        yield from _read(path)
    except OSError as error:  # no permission, a damaged page of a parquet file, a disk that fails
        raise ValueError(f"{path}: cannot be read ({error}); check the file and its permissions") from error


def _read(path: Path) -> Iterator[Row]:
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(f"data path {path} does not exist; give {_LOADERS}")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.name.removesuffix(".gz").endswith((".jsonl", ".json", ".ndjson")):
        return _read_json(path)
    raise ValueError(f"data path {path}: unknown kind of file; give {_LOADERS}")


def _read_json(path: Path) -> Iterator[Row]:
    try:
        with _open(path) as file:
            start = file.read(4096)
            array = start.removeprefix(_BOM).lstrip().startswith(b"[")
        with _open(path) as file:
            yield from (_json_array if array else _json_lines)(path, file)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); copy or download it again") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _json_lines(path: Path, file: BinaryIO) -> Iterator[Row]:
    number = 0
    for line_number, line in enumerate(file, start=1):
        content = (line.removeprefix(_BOM) if line_number == 1 else line).strip()
        if not content:
            continue
        number += 1
        where = f"{path}:{line_number}"
        try:
            record = json.loads(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from error
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not valid JSON: {error.msg} at column {error.colno}; each line must be one whole JSON object"
            ) from error
        except RecursionError:
            raise ValueError(f"{where}: nested too deeply; each line must be one JSON object of a row") from None
        yield _row(record, number, where)


def _json_array(path: Path, file: BinaryIO) -> Iterator[Row]:
    try:
        records = json.loads(file.read().removeprefix(_BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply; give a list of JSON objects") from None
    for number, record in enumerate(records, start=1):
        yield _row(record, number, f"{path}: row {number}")


def _row(record: Any, number: int, where: str) -> Row:
    if not isinstance(record, dict):
        raise ValueError(
            f"{where}: expected a JSON object, found {type(record).__name__}; write {{...}} with named fields"
        )
    return Row(record, number, where)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error
    number = 0
    with file:
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
            for record in batch.to_pylist():
                number += 1
                yield Row(record, number, f"{path}: row {number}")


def _read_folder(path: Path) -> Iterator[Row]:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise ValueError(f"data path {path} holds several splits; give one: {', '.join(str(path / s) for s in splits)}")
    if not (path / "state.json").is_file():
        files = ", ".join(sorted(str(file.relative_to(path)) for file in path.rglob("*.*") if file.is_file())[:10])
        raise ValueError(
            f"data path {path} is no folder written by datasets.save_to_disk; name a file in it: {files or 'none'}"
        )
    import datasets

    dataset = datasets.load_from_disk(str(path))
    assert isinstance(dataset, datasets.Dataset)
    for number, record in enumerate(dataset, start=1):
        yield Row(dict(record), number, f"{path}: row {number}")
