"""What a cache of tokenized rows depends on, as one hash. File names and places are no part of it, their content is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_align.config.data import ChatDataConfig, RowsConfig
from nemo_align.data.cache_folder import writing_cache
from nemo_align.data.tokenized_rows_writer import FORMAT_VERSION
from nemo_align.runtime import watchdog
from nemo_align.runtime.signals import leave_if_asked

_CHUNK_BYTES = 1 << 22
_SAMPLE_BYTES, _FARTHEST_SAMPLES = 1 << 16, 1 << 26
_SAMPLES = 4096  # of a .bin, where they need not lie farther apart: 256 MiB


def cache_key(
    kind: str,
    sources: Mapping[str, RowsConfig],
    tokenizer_fingerprint: str,
    settings: Mapping[str, Any],
    cache_dir: Path,
) -> str:
    """Hex hash over the rows' bytes, the tokenizer, and every setting that changes an example or its order."""
    described = {
        "format": FORMAT_VERSION,
        "kind": kind,
        "tokenizer": tokenizer_fingerprint,
        "settings": dict(settings),
        "sources": [
            [content_hash(Path(rows.path), cache_dir), rows.format, rows.max_rows, rows.fraction]
            for rows in sources.values()
        ],
    }
    return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16).hexdigest()


def content_hash(path: Path, cache_dir: Path) -> str:
    """blake2b of a file, or of all files of a folder with their names.

    Remembered in `cache_dir` with the files' sizes and times, so that a thousand ranks do not all read the rows.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise ValueError(
            f"data path {path} does not exist or holds no file; give a file of rows, or a folder written by "
            "datasets.save_to_disk"
        )

    def add(digest: hashlib.blake2b) -> None:
        for file in files:
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
            _add_whole(digest, file)

    return _remembered_hash(path, [(str(file.relative_to(path)), file) for file in files], cache_dir, add)


def indexed_hash(prefix: str | Path, cache_dir: Path) -> str:
    """blake2b of a `.bin`/`.idx` pair, whatever it is called: all of the index, the size and blocks of the token ids.

    A `.bin` up to 256 MiB is read whole. Of a larger one 64 KiB are read at evenly spaced places, at most 64 MiB apart,
    and the last 64 KiB: 1 TB costs the reading of 1 GB. Remembered like `content_hash`."""
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")

    def add(digest: hashlib.blake2b) -> None:
        size = tokens.stat().st_size
        digest.update(f"{index.stat().st_size}\0{size}\0".encode())
        _add_whole(digest, index)
        step = min(max(size // _SAMPLES, _SAMPLE_BYTES), _FARTHEST_SAMPLES)
        with _reading(tokens), tokens.open("rb", buffering=0) as stream:
            for offset in (*range(0, size, step), max(0, size - _SAMPLE_BYTES)):
                _still_hashing(tokens)
                digest.update(os.pread(stream.fileno(), _SAMPLE_BYTES, offset))

    return _remembered_hash(Path(prefix), [(".idx", index), (".bin", tokens)], cache_dir, add)


def _add_whole(digest: hashlib.blake2b, file: Path) -> None:
    with _reading(file), file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            _still_hashing(file)
            digest.update(chunk)


def _still_hashing(file: Path) -> None:
    """Terabytes take minutes, in which the other ranks wait."""
    watchdog.beat(f"reading {file}")
    leave_if_asked()


def _remembered_hash(
    path: Path, files: Sequence[tuple[str, Path]], cache_dir: Path, add: Callable[[hashlib.blake2b], None]
) -> str:
    """The hash that `add` makes of `files` (name, place), unless it was made before of files of these sizes and times.

    Raises ValueError for a file that cannot be read, or a `cache_dir` that cannot be written."""
    memo = cache_dir / f"content_{hashlib.blake2b(str(path.absolute()).encode(), digest_size=10).hexdigest()}.json"
    with _reading(path):
        stamp = [[name, *_identity(file)] for name, file in files]
    remembered = _remembered(memo, stamp)
    if remembered is not None:
        return remembered
    digest = hashlib.blake2b(digest_size=16)
    with _reading(path):
        add(digest)
    with writing_cache(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        writing = memo.with_name(f".{memo.name}.{os.getpid()}")
        writing.write_text(json.dumps({"stamp": stamp, "blake2b": digest.hexdigest()}), encoding="utf-8")
        os.replace(writing, memo)
    return digest.hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}); check the file and its permissions") from error


def _remembered(memo: Path, stamp: list[list[Any]]) -> str | None:
    """The hash that was found for files of these sizes and times. A damaged note is no note."""
    try:
        stored = json.loads(memo.read_text(encoding="utf-8"))
        return str(stored["blake2b"]) if stored["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def common_settings(config: ChatDataConfig, sources: Mapping[str, RowsConfig], seed: int) -> dict[str, Any]:
    """The settings that matter for every kind; the seed only where it chooses rows."""
    chooses = any(rows.max_rows is not None or rows.fraction is not None for rows in sources.values())
    return {
        "sequence_length": config.sequence_length,
        "overlong": config.overlong,
        "bad_rows": config.bad_rows,
        "default_system": config.default_system,
        "seed": seed if chooses else None,
    }
