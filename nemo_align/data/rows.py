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
from nemo_align.data.chat import UnreadableRow
from nemo_align.data.dataset_folders import check_columns, check_state

_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_PARQUET_BATCH_ROWS = 1024
_LOADERS = ".jsonl, .jsonl.gz, .json, .json.gz, .parquet or a folder written by datasets.save_to_disk"


@dataclass(frozen=True)
class Row:
    """One row. `number` counts rows from 1; `where` is `file:line` for JSON Lines, else `file: row n`."""

    record: dict[str, Any]
    number: int
    where: str
    line: int | None = None  # of a JSON Lines file
    text: bytes | None = None  # that line as it stands there
    error: UnreadableRow | None = None  # why there is no record


def read_rows(config: RowsConfig, *, seed: int, with_unreadable: bool = False) -> Iterator[Row]:
    """The rows of one source, in file order; with max_rows or fraction a seeded choice of them.

    A row that cannot be read is a ValueError, or with `with_unreadable` a Row whose `error` says why."""
    chosen = choose_rows(config, seed=seed)
    for row in _all_rows(Path(config.path)):
        if chosen is not None and row.number not in chosen:
            continue
        if row.error is not None and not with_unreadable:
            raise ValueError(f"{row.where}: {row.error}") from row.error
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
        if line_number == 1 and content.startswith(_GZIP):
            raise ValueError(f"{path}: holds gzip data; give it a name that ends in .gz")
        number += 1
        where = f"{path}:{line_number}"
        record, problem = _parsed(content)
        yield Row(record, number, where, line_number, content, problem)


def _parsed(content: bytes) -> tuple[dict[str, Any], UnreadableRow | None]:
    """The object of one line, or why there is none."""
    one_object = "each line must be one whole JSON object"
    try:
        record = _load(content)
    except UnicodeDecodeError as error:
        return {}, UnreadableRow(
            f"not UTF-8 ({error.reason} at byte {error.start})", "convert the file", reason="not UTF-8"
        )
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} at column {error.colno}"
        return {}, UnreadableRow(problem, one_object, reason="not valid JSON")
    except RecursionError:
        return {}, UnreadableRow("nested too deeply", one_object, reason="nested too deeply")
    except _RepeatedKey as error:
        return {}, UnreadableRow(
            f"the key {error.args[0]!r:.40} stands there twice", "keep one of the two", reason="repeated key"
        )
    except ValueError as error:  # Python's limit for the digits of a number
        return {}, UnreadableRow(f"not valid JSON: {error}", "write shorter numbers", reason="not valid JSON")
    return _object(record)


def _object(record: Any) -> tuple[dict[str, Any], UnreadableRow | None]:
    if isinstance(record, dict):
        return record, None
    return {}, UnreadableRow(
        f"expected a JSON object, found {type(record).__name__}",
        "write {...} with named fields",
        reason="not an object",
    )


class _RepeatedKey(ValueError):
    """An object says the same key twice; json would keep the last in silence."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return record


def _load(content: bytes) -> Any:
    return json.loads(content.decode("utf-8"), object_pairs_hook=_unique)


def _json_array(path: Path, file: BinaryIO) -> Iterator[Row]:
    try:
        records = _load(file.read().removeprefix(_BOM))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}; a file that starts with [ "
            "must be one whole JSON array of objects"
        ) from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply; give a list of JSON objects") from None
    except _RepeatedKey as error:
        raise ValueError(f"{path}: the key {error.args[0]!r:.40} stands twice in one object; keep one") from None
    except ValueError as error:  # Python's limit for the digits of a number
        raise ValueError(f"{path}: not valid JSON: {error}; write shorter numbers") from error
    for number, item in enumerate(records, start=1):
        record, problem = _object(item)
        text = json.dumps(item).encode() if problem is not None else None
        yield Row(record, number, f"{path}: row {number}", text=text, error=problem)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file ({_first_line(error)}); copy or write it again") from error
    number = 0
    with file:
        names = file.schema_arrow.names
        if len(set(names)) != len(names):
            raise ValueError(f"{path}: two columns have the same name ({', '.join(names)}); rename one")
        batches = file.iter_batches(batch_size=_PARQUET_BATCH_ROWS)
        while True:
            try:
                batch = next(batches, None)
            except pyarrow.ArrowException as error:
                raise ValueError(
                    f"{path}: damaged after row {number} ({_first_line(error)}); copy or write it again"
                ) from error
            if batch is None:
                return
            for record, problem in _batch_records(batch):
                number += 1
                yield Row(record, number, f"{path}: row {number}", error=problem)


def _batch_records(batch: Any) -> Iterator[tuple[dict[str, Any], UnreadableRow | None]]:
    """The rows of a record batch. A string column may hold bytes that are no UTF-8: found row by row."""
    try:
        yield from ((record, None) for record in batch.to_pylist())
        return
    except UnicodeDecodeError:
        pass
    for position in range(batch.num_rows):
        try:
            yield batch.slice(position, 1).to_pylist()[0], None
        except UnicodeDecodeError as error:
            yield (
                {},
                UnreadableRow(
                    f"not UTF-8 ({error.reason} at byte {error.start} of a column)",
                    "write the column again as text",
                    reason="not UTF-8",
                ),
            )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _read_folder(path: Path) -> Iterator[Row]:
    if (path / "dataset_dict.json").is_file():
        splits = _splits(path / "dataset_dict.json")
        raise ValueError(f"data path {path} holds several splits; give one: {', '.join(str(path / s) for s in splits)}")
    if not (path / "state.json").is_file():
        files = ", ".join(sorted(str(file.relative_to(path)) for file in path.rglob("*.*") if file.is_file())[:10])
        raise ValueError(
            f"data path {path} is no folder written by datasets.save_to_disk; name a file in it: {files or 'none'}"
        )
    import datasets

    check_state(path)
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged folder makes of the library: it is the folder that is wrong
        raise ValueError(
            f"data path {path}: datasets cannot load it ({_first_line(error)}); write it again with save_to_disk"
        ) from error
    assert isinstance(dataset, datasets.Dataset)
    check_columns(path, dataset.features)
    for number, record in enumerate(dataset, start=1):
        yield Row(dict(record), number, f"{path}: row {number}")


def _splits(path: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(path.read_text(encoding="utf-8"))["splits"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({_first_line(error)}); write the folder again with save_to_disk") from error
