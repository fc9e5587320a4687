"""Checksums of files, whole and part by part."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest

from nemo_align.checkpoint import checksums

CONTENT = bytes(range(256)) * 100


@pytest.mark.parametrize("algorithm", checksums.ALGORITHMS)
def test_a_whole_file(algorithm: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(CONTENT)
    entry = checksums.entry_of_file(path, algorithm)
    assert checksums.is_entry(entry) and entry["bytes"] == len(CONTENT)
    if algorithm == "sha256":
        assert entry["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert checksums.problem_of(path, "data", entry) is None
    path.write_bytes(CONTENT[:-1] + b"\0")
    assert checksums.problem_of(path, "data", entry) == "data is damaged: its checksum differs from the recorded one"


def test_a_file_in_parts_tells_where_it_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(CONTENT)
    ends = [0, 1000, 20_000, len(CONTENT)]
    parts = [[end, checksums.digest_of([CONTENT[begin:end]])] for begin, end in itertools.pairwise(ends)]
    entry = checksums.entry(len(CONTENT), parts)
    assert checksums.is_entry(entry) and checksums.problem_of(path, "data", entry) is None
    path.write_bytes(CONTENT[:5000] + b"x" + CONTENT[5001:])
    problem = checksums.problem_of(path, "data", entry)
    assert problem is not None and problem.startswith("data is damaged between bytes 1,000 and 20,000")
    path.write_bytes(CONTENT[:900])
    assert checksums.problem_of(path, "data", entry) == "data ends at byte 900"
    path.unlink()
    assert checksums.problem_of(path, "data", entry) == "data is missing"
