"""Reading rows: every kind of file, with the place of each row; and the seeded choice."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_align.config.data import ChatDataConfig, RowsConfig
from nemo_align.data.cache_key import cache_key, common_settings, content_hash, indexed_hash
from nemo_align.data.rows import read_rows

RECORDS = [{"prompt": f"question {n}", "completion": "é\u2028 answer", "n": n} for n in range(25)]


def lines(records: list[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_jsonl(folder: Path) -> Path:
    (folder / "rows.jsonl").write_bytes(lines(RECORDS).encode())
    return folder / "rows.jsonl"


def write_windows(folder: Path) -> Path:
    """Byte-order mark, CRLF, blank lines, no newline at the end."""
    text = "\ufeff" + lines(RECORDS).replace("\n", "\r\n\r\n").rstrip()
    (folder / "rows.json").write_bytes(text.encode())
    return folder / "rows.json"


def write_gzip(folder: Path) -> Path:
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines(RECORDS).encode()))
    return folder / "rows.jsonl.gz"


def write_array_named_jsonl(folder: Path) -> Path:
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(b"\n " + json.dumps(RECORDS, indent=1).encode()))
    return folder / "rows.jsonl.gz"


def write_parquet(folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), folder / "rows.parquet", row_group_size=7)
    return folder / "rows.parquet"


def write_dataset(folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(RECORDS).save_to_disk(folder / "dataset", max_shard_size=500)
    return folder / "dataset"


@pytest.mark.parametrize(
    "write", [write_jsonl, write_windows, write_gzip, write_array_named_jsonl, write_parquet, write_dataset]
)
def test_every_kind_gives_the_same_rows(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    rows = list(read_rows(RowsConfig(path=str(path)), seed=0))
    assert [row.record for row in rows] == RECORDS
    assert [row.number for row in rows] == list(range(1, 26))
    fourth = {write_jsonl: ":4", write_windows: ":7", write_gzip: ":4"}.get(write, ": row 4")
    assert rows[3].where == f"{path}{fourth}"


def test_the_choice_is_seeded_nested_and_in_order(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path))

    def numbers(seed: int = 1, **choice) -> list[int]:
        return [row.number for row in read_rows(RowsConfig(path=path, **choice), seed=seed)]

    ten = numbers(max_rows=10)
    assert len(ten) == 10 and ten == sorted(ten) and ten != list(range(1, 11))
    assert numbers(fraction=0.4) == ten
    assert numbers(seed=2, max_rows=10) != ten
    assert set(numbers(max_rows=5)) < set(ten)
    assert numbers(max_rows=3, fraction=0.5) == numbers(max_rows=3)
    assert numbers(max_rows=1000) == numbers() == list(range(1, 26))
    assert len(numbers(fraction=0.001)) == 1
    for wrong in ({"fraction": 0.0}, {"fraction": 1.5}, {"max_rows": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            numbers(**wrong)


BAD_FILES = {
    "cut line": (b'{"a": 1}\n{"a": \n', r"rows\.jsonl:2: not valid JSON"),
    "two objects": (b'{"a": 1} {"a": 2}\n', r"rows\.jsonl:1: not valid JSON: Extra data"),
    "a list on a line": (b'{"a": 1}\n[1]\n', r"rows\.jsonl:2: expected a JSON object, found list"),
    "latin-1": ('{"a": 1}\n\n{"a": "é"}\n'.encode("latin-1"), r"rows\.jsonl:3: not UTF-8"),
    "deep": (b'{"a": 1}\n{"a": ' + b"[" * 200_000 + b"\n", r"rows\.jsonl:2: "),
    "array with a number": (b"[{}, 3]", r"rows\.jsonl: row 2: expected a JSON object, found int"),
    "cut array": (b'[{},\n{"a": 1}', r"rows\.jsonl:2: not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_name_the_line(case: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[case]
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(RowsConfig(path=str(tmp_path / "rows.jsonl")), seed=0))


def test_bad_paths(tmp_path: Path) -> None:
    import datasets

    def read(path: Path) -> list:
        return list(read_rows(RowsConfig(path=str(path)), seed=0))

    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "no.jsonl")
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(ValueError, match="unknown kind of file"):
        read(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match=r"name a file in it: rows\.csv"):
        read(tmp_path)
    (tmp_path / "rows.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="not a parquet file"):
        read(tmp_path / "rows.parquet")
    good = write_parquet(tmp_path)
    damaged = bytearray(good.read_bytes())
    damaged[4:200] = bytes(196)
    good.write_bytes(damaged)
    with pytest.raises(ValueError, match="cannot be read"):
        read(good)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines(RECORDS).encode())[:-20])
    with pytest.raises(ValueError, match="damaged gzip"):
        read(tmp_path / "rows.jsonl.gz")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS[:2])})
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"several splits; give one: .*splits/train"):
        read(tmp_path / "splits")
    assert len(read(tmp_path / "splits" / "train")) == 2


def test_the_key_follows_content_and_settings_not_names(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path)
    cache = tmp_path / "cache"

    def key(path: Path = path, seed: int = 1, length: int = 10, **rows) -> str:
        sources = {"a": RowsConfig(path=str(path), **rows)}
        return cache_key(
            "sft", sources, "t", common_settings(ChatDataConfig(sequence_length=length), sources, seed), cache
        )

    first = key()
    other = tmp_path / "renamed.jsonl"
    other.write_bytes(path.read_bytes())
    assert key(other) == first
    assert key(seed=2) == first, "the seed chooses nothing here"
    different = {key(length=11), key(max_rows=5), key(max_rows=5, seed=2), key(format="alpaca")}
    assert len(different | {first}) == 5
    content = path.read_bytes()
    path.write_bytes(content.replace(b"question 3", b"question X"))
    assert key() != first
    path.write_bytes(content)
    assert key() == first


def test_the_hash_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path)
    first = content_hash(path, tmp_path / "cache")
    (memo,) = (tmp_path / "cache").iterdir()
    memo.write_text(memo.read_text().replace(first, "remembered"))
    assert content_hash(path, tmp_path / "cache") == "remembered"
    os.utime(path, ns=(1, 1))
    assert content_hash(path, tmp_path / "cache") == first


def test_a_folder_is_hashed_with_its_names(tmp_path: Path) -> None:
    path = write_dataset(tmp_path)
    first = content_hash(path, tmp_path / "cache")
    shard = next(path.glob("*.arrow"))
    shard.rename(path / "data-other.arrow")
    assert content_hash(path, tmp_path / "cache") != first


def test_a_terabyte_of_token_ids_is_hashed_in_samples(tmp_path: Path) -> None:
    """Its index whole, its size, and 64 KiB at least every 64 MiB; a small set whole."""
    cache, prefix = tmp_path / "cache", tmp_path / "set"
    index, tokens = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    index.write_bytes(bytes(range(256)))
    tokens.touch()
    os.truncate(tokens, 1 << 40)  # a hole: no disk is that large here

    def changed(place: Path, offset: int) -> str:
        with place.open("r+b") as file:
            file.seek(offset)
            file.write(b"x")
        return indexed_hash(prefix, cache)

    began = time.monotonic()
    first = indexed_hash(prefix, cache)
    took = time.monotonic() - began
    assert took < 60, "1 GiB of it is read"
    (memo,) = cache.iterdir()
    memo.write_text(memo.read_text().replace(first, "remembered"))
    assert indexed_hash(prefix, cache) == "remembered"
    found = [first, changed(tokens, 3), changed(tokens, 5 << 26), changed(tokens, (1 << 40) - 1), changed(index, 100)]
    os.truncate(tokens, 1 << 20)
    found += [indexed_hash(prefix, cache), changed(tokens, 777_777)]
    assert len(set(found)) == len(found)
    moved = tmp_path / "elsewhere"
    for suffix in (".bin", ".idx"):
        prefix.with_suffix(suffix).rename(moved.with_suffix(suffix))
    assert indexed_hash(moved, cache) == found[-1]
    with pytest.raises(ValueError, match=r"set: cannot be read .*No such file.*permissions"):
        indexed_hash(prefix, cache)
