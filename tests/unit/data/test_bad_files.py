"""Files that are no rows at all, or rows in an odd dress: read right or refused by name, in bounded time and memory."""

from __future__ import annotations

import gzip
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_align.config.data import RowsConfig
from nemo_align.data.cache_key import content_hash
from nemo_align.data.prepare_pretraining import prepare_pretraining
from nemo_align.data.rows import Row, read_rows
from nemo_align.data.tokenized_rows import TokenizedRows
from nemo_align.data.tokenizer import Tokenizer
from tests.bad_input_tally import tried
from tests.unit.data.bad_rows_corpus import LABELS, VALID, chat
from tests.unit.data.test_bad_rows import rejects, tokenize

GOOD = {"messages": chat("q", "a")}
PAIR = VALID["pair", "prompt_chosen_rejected"]
LINE = json.dumps(GOOD).encode()


def rows_of(path: Path) -> list[Row]:
    return list(read_rows(RowsConfig(path=str(path)), seed=0))


def refused(action: Callable[[], Any]) -> str:
    """The message of the ValueError that `action` raises: ours, not a library's."""
    tried["files"] += 1
    with pytest.raises(ValueError) as caught:
        action()
    assert type(caught.value) is ValueError, repr(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("crlf.jsonl", LINE + b"\r\n" + LINE + b"\r\n"),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINE + b"\n" + LINE),
        ("blank.jsonl", b"\n  \n" + LINE + b"\n\n\t\n" + LINE + b"\n\n"),
        ("array.jsonl", b"[" + LINE + b",\n" + LINE + b"]"),
        ("bom_array.json", b"\xef\xbb\xbf [" + LINE + b"," + LINE + b"]\r\n"),
        ("lines.json", LINE + b"\n" + LINE),
        ("packed.jsonl.gz", gzip.compress(LINE + b"\n" + LINE)),
        ("parts.jsonl.gz", gzip.compress(LINE + b"\n") + gzip.compress(LINE)),
        ("packed.json.gz", gzip.compress(b"[" + LINE + b"," + LINE + b"]")),
    ],
)
def test_odd_dresses_are_read(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert [row.record for row in rows_of(path)] == [GOOD, GOOD]


FILES = [
    ("empty.jsonl", b"", "no rows"),
    ("blank.jsonl", b"\n \r\n\t\n", "no rows"),
    ("nothing.json", b"[]", "no rows"),
    ("empty.jsonl.gz", gzip.compress(b""), "no rows"),
    ("empty.parquet", b"", "not a parquet file"),
    ("hidden.jsonl", gzip.compress(LINE), "holds gzip data; give it a name that ends in .gz"),
    ("plain.jsonl.gz", LINE, "damaged gzip file"),
    ("cut.jsonl.gz", gzip.compress(LINE * 50)[:-9], "damaged gzip file"),
    ("flipped.jsonl.gz", bytes(b ^ (i == 20) for i, b in enumerate(gzip.compress(LINE * 50))), "damaged gzip file"),
    ("zeros.jsonl", b"\0" * 5000, ":1: not valid JSON"),
    ("utf16.jsonl", json.dumps(GOOD).encode("utf-16"), ":1: not UTF-8"),
    ("pretty.jsonl", json.dumps(GOOD, indent=2).encode(), ":1: not valid JSON"),
    ("cut.json", b"[" + LINE + b",", ":1: not valid JSON"),
    ("after.json", b"[" + LINE + b"]\n[]", ":2: not valid JSON: Extra data"),
    ("deep.json", b"[" * 200_000, "nested too deeply"),
    ("twice.json", b'[{"a": 1, "a": 2}]', "the key 'a' stands twice"),
    ("digits.json", b"[" + b"1" * 5000 + b"]", "not valid JSON: Exceeds the limit"),
    ("numbers.json", b"[1, 2]", ": row 1: expected a JSON object, found int"),
    ("not.parquet", LINE, "not a parquet file"),
    ("rows.csv", b"q,a\n1,2\n", "unknown kind of file"),
    ("mac.jsonl", LINE + b"\r" + LINE, ":1: not valid JSON: Extra data"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=[name for name, *_ in FILES])
@pytest.mark.parametrize("policy", ["error", "quarantine"])
def test_files_without_good_rows(
    name: str, content: bytes, message: str, policy: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Under either policy: a file is not a row, and a file of which nothing is left is an error."""
    path = tmp_path / name
    path.write_bytes(content)
    said = refused(lambda: tokenize("dialogue", path, tokenizer, bad_rows=policy))
    assert said.startswith((f"{path}:", f"data path {path}")), said
    assert message in said and not list((tmp_path / "cache").glob("*/meta.json"))


def test_places_that_are_no_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "nowhere.jsonl").symlink_to(tmp_path / "absent.jsonl")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text("{}")
    for name, message in {
        "pipe.jsonl": "does not exist or holds no file",
        "folder.jsonl": "does not exist or holds no file",
        "absent.jsonl": "does not exist or holds no file",
        "nowhere.jsonl": "does not exist or holds no file",
        "loop.jsonl": "does not exist or holds no file",
        "other": "no folder written by datasets.save_to_disk; name a file in it: notes.txt",
        "saved": "state.json: damaged",
        "splits": "dataset_dict.json: damaged",
    }.items():
        said = refused(lambda name=name: tokenize("dialogue", tmp_path / name, tokenizer))
        assert str(tmp_path / name) in said and message in said, said


def test_a_file_that_cannot_be_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Root may read everything, so reading fails here by a file whose first page does not exist."""
    path = tmp_path / "rows.jsonl"
    path.symlink_to("/proc/self/mem")
    for policy in ("error", "quarantine"):
        said = refused(lambda policy=policy: tokenize("dialogue", path, tokenizer, bad_rows=policy))
        assert str(path) in said and "cannot be read" in said and "permissions" in said
    assert "cannot be read" in refused(lambda: rows_of(path))
    if os.geteuid() != 0:
        path.unlink()
        path.write_bytes(LINE)
        path.chmod(0)
        assert "Permission denied" in refused(lambda: tokenize("dialogue", path, tokenizer))


def test_a_cache_directory_that_cannot_be_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        said = refused(lambda place=place: tokenize("dialogue", path, tokenizer, cache_dir=str(place)))
        assert said.startswith(f"data.cache_dir: {place} cannot be written") and "set data.cache_dir" in said


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stamp": 1}', '{"stamp": null, "blake2b": null}', "\0\0"])
def test_a_damaged_note_of_a_hash_is_no_note(content: str, tmp_path: Path) -> None:
    path, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    path.write_bytes(LINE)
    expected = content_hash(path, cache)
    (note,) = cache.glob("content_*.json")
    note.write_text(content)
    tried["files"] += 1
    assert content_hash(path, cache) == expected


def write_parquet(path: Path, table: dict[str, Any]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return path


def test_parquet(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import pyarrow

    path = tmp_path / "rows.parquet"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"question": ["q"], "answer": ["a"]}, "row 1: columns: no row format fits question, answer"),
        ({"prompt": ["q", "q"], "response": ["a", None]}, "row 2: response: expected an object, found nothing"),
        ({"prompt": [1, 2], "response": ["a", "b"]}, "row 1: prompt: expected a list of messages, found a number"),
        ({"prompt": [b"q"], "response": ["a"]}, "row 1: prompt: expected a list of messages, found bytes"),
        ({"messages": [[1, 2]]}, "row 1: messages[0]: expected an object, found a number"),
        ({"messages": pyarrow.array([None], pyarrow.null())}, "row 1: messages: expected a list"),
        ({"messages": pyarrow.array([], pyarrow.string())}, "no rows"),
    ]
    for table, message in wrong:
        write_parquet(path, table)
        said = refused(lambda: tokenize("dialogue", path, tokenizer))
        assert said.startswith(f"{path}: ") and message in said, said
    bad_text = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(struct.pack("<iii", 0, 1, 3)), pyarrow.py_buffer(b"q\xff\xfe")
    )
    write_parquet(path, {"prompt": bad_text, "response": ["a", "b"]})
    assert "row 2: not UTF-8" in refused(lambda: tokenize("dialogue", path, tokenizer))
    rows = tokenize("dialogue", path, tokenizer, bad_rows="quarantine")
    assert rows.report["kept"] == 1 and rows.report["quarantined_by_reason"] == {"not UTF-8": 1}
    assert rejects(rows)[None]["row"] == 2
    write_parquet(path, {"prompt": ["q" * 40] * 5000, "response": [str(n) for n in range(5000)]})
    whole = path.read_bytes()
    for cut in (8, 400, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:cut])
        assert "not a parquet file" in refused(lambda: tokenize("dialogue", path, tokenizer))
    path.write_bytes(whole[:100] + bytes(2000) + whole[2100:])
    said = refused(lambda: tokenize("dialogue", path, tokenizer))
    assert said.startswith(f"{path}: ") and ("cannot be read" in said or "damaged" in said)


LONG = 10_000_000  # letters of a line
LONG_SECONDS = 30.0  # for one such line: ten times what the longest takes on a busy machine
WORDS = "word " * (LONG // 5)
# kind of rows -> (a good row, [(a row of that length, what the message says behind file and line)])
LONG_ROWS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "dialogue": (GOOD, [
        (json.dumps({"messages": chat(WORDS, "a")}), "length: "),
        ('{"messages": "' + "x" * LONG, "not valid JSON: Unterminated string"),
        (json.dumps({"messages": [{"role": "x" * LONG, "content": ""}]}), "messages[0].role: unknown role"),
        (json.dumps({"y" * LONG: 1}), "messages: missing"),
    ]),
    "rated": (GOOD | LABELS, [
        (json.dumps({"messages": chat("q", WORDS)} | LABELS), "length: "),
        ('{"messages": "' + "x" * LONG, "not valid JSON: Unterminated string"),
        (json.dumps(GOOD | LABELS | {"helpfulness": "x" * LONG}), "helpfulness: expected a number, found a string"),
        (json.dumps(GOOD | LABELS)[:-1] + ', "verbosity": ' + "9" * LONG + "}", "not valid JSON: Exceeds the limit"),
    ]),
    "pair": (PAIR, [
        (json.dumps(PAIR | {"rejected": WORDS}), "length: "),
        (json.dumps(PAIR | {"chosen": WORDS, "rejected": WORDS}), "rejected: the same text as chosen"),
        ('{"prompt": "' + "x" * LONG, "not valid JSON: Unterminated string"),
        (json.dumps(PAIR | {"chosen": [{"role": "x" * LONG, "content": ""}]}), "chosen.role: "),
        (json.dumps(PAIR | {"chosen_reward": "x" * LONG}), "chosen_reward: expected a number, found a string"),
    ]),
    "score": (PAIR, [
        (json.dumps(PAIR | {"rejected": WORDS}), "length: "),
        (json.dumps({"y" * LONG: 1}), "prompt: missing"),
    ]),
}  # fmt: skip


# A long text takes seconds to tokenize: one kind of row with it in `make test`, the others in `make test-full`.
TOO_LONG = [pytest.param(kind, 0, marks=[] if kind == "dialogue" else pytest.mark.full) for kind in LONG_ROWS]


@pytest.mark.parametrize(
    ("kind", "number"),
    [*TOO_LONG, *((kind, number) for kind, (_, rows) in LONG_ROWS.items() for number in range(1, len(rows)))],
)
def test_a_line_of_ten_megabytes(kind: str, number: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Too long, or wrong: named with the line in bounded time, and the message does not quote it."""
    good, rows = LONG_ROWS[kind]
    content, message = rows[number]
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(good)}\n{content}\n")
    began = time.monotonic()
    said = refused(lambda: tokenize(kind, path, tokenizer, overlong="error"))
    assert said.startswith(f"{path}:2: {message}") and len(said) < 1000, said[:1000]
    found = tokenize(kind, path, tokenizer, overlong="error", bad_rows="quarantine")
    [reject] = rejects(found).values()
    assert reject["line"] == 2 and len(reject["message"]) < 1000 and reject["raw"] == content
    took = time.monotonic() - began
    assert took < 2 * LONG_SECONDS, took


def test_the_columns_of_ten_megabytes_are_not_quoted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"y" * LONG: 1}) + "\n")
    for kind in LONG_ROWS:
        began = time.monotonic()
        said = refused(lambda kind=kind: tokenize(kind, path, tokenizer))
        assert f"{path}:1: columns: no row format fits yyyy" in said and len(said) < 3000
        assert time.monotonic() - began < LONG_SECONDS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "' + "x" * LONG, ":1: not valid JSON: Unterminated string"),
        (json.dumps({"y" * LONG: 1}), ":1: no key 'text' (found: yyyy"),
        (json.dumps({"text": ["x" * LONG]}), ":1: 'text' is list"),
        (json.dumps({"text": "x" * LONG + "\ud800"}), ":1: text: half a character"),
        (json.dumps({"text": WORDS}), None),  # a document may be long
    ],
    ids=["cut off", "columns", "a list", "half a character", "a long document"],
)
def test_a_document_of_ten_megabytes(line: str, message: str | None, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    began = time.monotonic()
    if message is None:
        info = prepare_pretraining([path], tokenizer, tmp_path / "out")
        assert (info.num_documents, info.num_tokens) == (1, len(tokenizer.encode_text(WORDS)) + 1)
    else:
        said = refused(lambda: prepare_pretraining([path], tokenizer, tmp_path / "out"))
        assert said.startswith(f"{path}{message}") and len(said) < 1000, said[:1000]
    took = time.monotonic() - began
    assert took < LONG_SECONDS, took


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_rows_than_a_batch(count: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Batches cross epoch borders, so a few rows fill any batch, on any number of ranks."""
    from nemo_align.data.source import RowSource
    from nemo_align.data.step_plan import StepLayout

    path = tmp_path / "rows.jsonl"
    path.write_bytes((LINE + b"\n") * count)
    rows = tokenize("dialogue", path, tokenizer)
    sources = [
        RowSource(rows, layout=StepLayout(capacity=4096, data_parallel=4), data_rank=rank, seed=0) for rank in range(4)
    ]
    for source in sources:
        step = source.step(0, 8)
        assert sum(len(examples) for part in step.plan.micro_batches for examples in part) == 8
        assert all(
            batch.tokens.shape == sources[0].step(0, 8).build((0,)).tokens.shape for batch in step.micro_batches()
        )
    seen = [
        batch.examples.tolist() for source in sources for step in source.evaluation(8) for batch in step.micro_batches()
    ]
    assert sorted(example for batch in seen for example in batch) == list(range(count))


def test_a_cache_is_read_again_with_its_rejects(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE + b"\nno\n")
    first: TokenizedRows = tokenize("dialogue", path, tokenizer, bad_rows="quarantine")
    stamp = (first.folder / "meta.json").stat().st_mtime_ns
    again = tokenize("dialogue", path, tokenizer, bad_rows="quarantine")
    assert again.fingerprint == first.fingerprint and (again.folder / "meta.json").stat().st_mtime_ns == stamp
    assert "2: not valid JSON" in refused(lambda: tokenize("dialogue", path, tokenizer))
