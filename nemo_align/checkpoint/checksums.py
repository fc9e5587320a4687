"""Checksums of the files of a checkpoint, whole or part by part.

An entry of the manifest is {"bytes": length, "blake3": digest}, or, for a file that is written and checked in parts,
{"bytes": length, "blake3": [[end of the part, digest], ...]} with parts that follow each other from byte 0 to the end.
BLAKE3 is several times faster than SHA-256 without hardware help and faster than the disks; SHA-256 is there for
places that ask for it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from blake3 import blake3

BLAKE3, SHA256 = "blake3", "sha256"
ALGORITHMS = (BLAKE3, SHA256)
_NEW = {BLAKE3: blake3, SHA256: hashlib.sha256}
_DIGITS = 64  # both have 256 bits
_READ_BYTES = 8 << 20


class Unreadable(ValueError):
    """A file that is there cannot be read: no sign that its content is damaged, so nothing older takes its place."""


class Hash(Protocol):
    def update(self, data, /) -> object: ...

    def hexdigest(self) -> str: ...


def new_hash(algorithm: str = BLAKE3) -> Hash:
    """A running checksum."""
    return _NEW[algorithm]()


def digest_of(chunks: Iterable, algorithm: str = BLAKE3) -> str:
    """Hex digest of bytes-like objects, one after the other."""
    running = new_hash(algorithm)
    for chunk in chunks:
        running.update(chunk)
    return running.hexdigest()


def entry(num_bytes: int, digest: str | Sequence[Sequence], algorithm: str = BLAKE3) -> dict:
    """The manifest's entry of a file."""
    return {"bytes": num_bytes, algorithm: digest}


def entry_of_file(path: Path, algorithm: str = BLAKE3) -> dict:
    """The manifest's entry of a file on disk, which is read."""
    running, count = new_hash(algorithm), 0
    for chunk in _chunks(path, 0, None):
        running.update(chunk)
        count += len(chunk)
    return entry(count, running.hexdigest(), algorithm)


def is_entry(value: object) -> bool:
    """Whether a value read from JSON is an entry whose parts follow each other to the file's end."""
    if not isinstance(value, dict) or not _is_count(value.get("bytes")):
        return False
    named = [key for key in value if key in ALGORITHMS]
    if len(named) != 1 or len(value) != 2:
        return False
    digest = value[named[0]]
    if not isinstance(digest, list):
        return _is_digest(digest)
    ends = [0]
    for part in digest:
        if not (isinstance(part, list) and len(part) == 2 and _is_count(part[0]) and _is_digest(part[1])):
            return False
        if part[0] <= ends[-1]:
            return False
        ends.append(part[0])
    return ends[-1] == value["bytes"]


def parts_of(described: dict) -> list[tuple[int, int, str, str]]:
    """(first byte, end, algorithm, digest) of each part of an entry; a file without parts is one."""
    algorithm = next(key for key in described if key in ALGORITHMS)
    digest = described[algorithm]
    if isinstance(digest, str):
        return [(0, described["bytes"], algorithm, digest)]
    ends = [0, *(end for end, _ in digest)]
    return [(ends[number], end, algorithm, found) for number, (end, found) in enumerate(digest)]


def problem_of(path: Path, name: str, described: dict) -> str | None:
    """What is wrong with the content of a file, found by reading it (about a second for some GB); None if nothing.

    Raises:
        Unreadable: the file is there and the disk does not give its content.
    """
    for first, end, algorithm, expected in parts_of(described):
        if problem := problem_of_part(path, name, first, end, algorithm, expected):
            return problem
    return None


def problem_of_part(path: Path, name: str, first: int, end: int, algorithm: str, expected: str) -> str | None:
    """`problem_of` for bytes [first, end) alone."""
    running, count = new_hash(algorithm), 0
    try:
        for chunk in _chunks(path, first, end - first):
            running.update(chunk)
            count += len(chunk)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        raise unreadable(path, error) from None
    if count != end - first:
        return f"{name} ends at byte {first + count:,}"
    if running.hexdigest() != expected:
        where = f" between bytes {first:,} and {end:,}" if first else ""
        return f"{name} is damaged{where}: its checksum differs from the recorded one"
    return None


def unreadable(path: Path, error: OSError) -> Unreadable:
    """The error for a file that the disk does not give, with what to do."""
    return Unreadable(
        f"{path} cannot be read: {error.strerror}. That may pass: mend the disk or its mount and start again. To go on "
        "without that checkpoint, move its folder away"
    )


def _chunks(path: Path, first: int, length: int | None) -> Iterable[memoryview]:
    buffer = memoryview(bytearray(_READ_BYTES if length is None else max(1, min(_READ_BYTES, length))))
    left = length
    with open(path, "rb", buffering=0) as stream:
        stream.seek(first, os.SEEK_SET)
        while left is None or left > 0:
            count = stream.readinto(buffer if left is None else buffer[: min(len(buffer), left)])
            if not count:
                return
            yield buffer[:count]
            left = None if left is None else left - count


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == _DIGITS and set(value) <= set("0123456789abcdef")
