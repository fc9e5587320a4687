"""What a cache of tokenized rows depends on, as one hash. File names and places are no part of it, their content is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_align.config.data import ChatDataConfig, RowsConfig
from nemo_align.data.tokenized_rows_writer import FORMAT_VERSION

_CHUNK_BYTES = 1 << 22


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
    stamp = [[str(file.relative_to(path)), *_identity(file)] for file in files]
    memo = cache_dir / f"content_{hashlib.blake2b(str(path.absolute()).encode(), digest_size=10).hexdigest()}.json"
    remembered = _remembered(memo, stamp)
    if remembered is not None:
        return remembered
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error}); check the file and its permissions") from error
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        writing = memo.with_name(f".{memo.name}.{os.getpid()}")
        writing.write_text(json.dumps({"stamp": stamp, "blake2b": digest.hexdigest()}), encoding="utf-8")
        os.replace(writing, memo)
    except OSError as error:
        raise ValueError(
            f"data.cache_dir: {cache_dir} cannot be written ({error}); make room, or set data.cache_dir to a folder "
            "that can be written and that every rank sees"
        ) from error
    return digest.hexdigest()


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
