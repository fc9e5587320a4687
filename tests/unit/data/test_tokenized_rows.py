"""The cache of tokenized rows: what is written is what is read, whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_align.data.tokenized_rows import TokenizedRows, open_or_build
from nemo_align.data.tokenized_rows_writer import TokenizedRowsWriter


def build_pairs(writer: TokenizedRowsWriter) -> dict[str, int]:
    writer.add(
        [([1, 2, 3], [False, False, True]), ([1, 2], [False, True])],
        origin=(0, 1),
        targets={"chosen_reward": 2.5, "labels": [1.0, float("nan")]},
    )
    writer.add(
        [([7], [False]), ([8, 9, 10, 11], [False, True, True, True])],
        origin=(1, 4),
        targets={"chosen_reward": float("nan"), "labels": [0.0, 3.0]},
    )
    return {"rows": 3, "kept": 2, "dropped_ties": 1}


def make(cache_dir: Path, build=build_pairs, fingerprint: str = "f" * 32) -> TokenizedRows:
    return open_or_build(
        cache_dir,
        kind="preference",
        fingerprint=fingerprint,
        segments=2,
        build=build,
        sources=["a", "b"],
        targets={"chosen_reward": None, "labels": 2},
    )


def test_round_trip(tmp_path: Path) -> None:
    rows = make(tmp_path)
    assert len(rows) == 2
    assert rows.lengths.tolist() == [[3, 2], [1, 4]] and rows.lengths.dtype == np.int32
    assert rows.loss_tokens.tolist() == [2, 3]
    (chosen, chosen_mask), (rejected, _) = rows.sequences(0)
    assert chosen.tolist() == [1, 2, 3] and chosen_mask.tolist() == [False, False, True] and chosen.dtype == np.int32
    assert rejected.tolist() == [1, 2]
    assert rows.targets["labels"].shape == (2, 2) and np.isnan(rows.targets["labels"][0, 1])
    assert rows.targets["chosen_reward"][0] == 2.5
    assert rows.origins.tolist() == [[0, 1], [1, 4]]
    assert rows.report["dropped_ties"] == 1 and "dropped ties 1" in rows.summary()
    with pytest.raises(IndexError):
        rows.sequences(2)


def test_second_call_only_opens(tmp_path: Path) -> None:
    first = make(tmp_path)

    def must_not_run(writer: TokenizedRowsWriter) -> dict[str, int]:
        raise AssertionError("built twice")

    assert make(tmp_path, must_not_run).example_fingerprint(1) == first.example_fingerprint(1)


@pytest.mark.parametrize("when", ["an example is added", "the arrays are closed", "a row is rejected"])
def test_a_full_disk_is_named_and_leaves_nothing(when: str, tmp_path: Path) -> None:
    """Arrays go to the disk in pieces of some kilobytes, or at their end."""

    def build(writer: TokenizedRowsWriter) -> dict[str, int]:
        if when == "a row is rejected":
            writer.reject({"raw": "x" * 100_000})
        for _ in range(1 if when != "an example is added" else 1000):
            build_pairs(writer)
        return {"rows": 2, "kept": 2}

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # bytes: not even a header
    try:
        with pytest.raises(ValueError) as caught:
            make(tmp_path / "cache", build)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(caught.value)
    assert said.startswith(f"data.cache_dir: {tmp_path / 'cache'} cannot be written (") and "File too large" in said
    assert "make room, or set data.cache_dir to a folder" in said
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(make(tmp_path / "cache")) == 2


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(writer: TokenizedRowsWriter) -> dict[str, int]:
        build_pairs(writer)
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        make(tmp_path, fail)
    assert list(tmp_path.iterdir()) == []
    assert len(make(tmp_path)) == 2


def test_no_examples_is_an_error_with_the_counts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no example is left.*dropped_ties"):
        make(tmp_path, lambda writer: {"rows": 5, "dropped_ties": 5})


def test_the_first_of_two_builders_wins(tmp_path: Path) -> None:
    def build_while_another_publishes(writer: TokenizedRowsWriter) -> dict[str, int]:
        make(tmp_path)
        return build_pairs(writer)

    assert len(make(tmp_path, build_while_another_publishes)) == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_damage_is_refused(tmp_path: Path) -> None:
    rows = make(tmp_path)
    meta = json.loads((rows.folder / "meta.json").read_text())
    np.save(rows.folder / "loss_tokens.npy", np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="damaged cache"):
        TokenizedRows(rows.folder)
    (rows.folder / "meta.json").write_text(json.dumps(meta | {"format": 0}))
    with pytest.raises(ValueError, match="format 0"):
        TokenizedRows(rows.folder)


def test_example_fingerprint_sees_tokens_masks_and_borders(tmp_path: Path) -> None:
    def variant(name: str, chosen, rejected) -> bytes:
        def build(writer: TokenizedRowsWriter) -> dict[str, int]:
            writer.add([chosen, rejected], origin=(0, 1), targets={"chosen_reward": 0.0, "labels": [0.0, 0.0]})
            return {}

        return make(tmp_path, build, fingerprint=name * 32).example_fingerprint(0)

    base = variant("a", ([1, 2], [False, True]), ([3, 4], [False, True]))
    assert variant("b", ([1, 2], [False, True]), ([3, 4], [False, True])) == base
    others = {
        variant("c", ([1, 2], [False, False]), ([3, 4], [False, True])),
        variant("d", ([1, 2, 3], [False, True, False]), ([4], [False])),
        variant("e", ([1, 5], [False, True]), ([3, 4], [False, True])),
    }
    assert base not in others and len(others) == 3


def test_what_a_killed_builder_left_is_removed(tmp_path: Path) -> None:
    """The builder is ended by SIGKILL in the middle, in a process of its own; another that lives is left alone."""
    script = """
import os, signal, sys
from pathlib import Path
from nemo_align.data.tokenized_rows import open_or_build
def build(writer):
    writer.add([([1, 2], [False, True])], origin=(0, 1))
    os.kill(os.getpid(), signal.SIGKILL)
open_or_build(Path(sys.argv[1]), kind="sft", fingerprint="f" * 32, segments=1, build=build, sources=["a"])
"""
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    alive = tmp_path / left.name.replace(f".{left.name.split('.')[-2]}.", f".{os.getpid()}.")
    alive.mkdir()

    def build(writer: TokenizedRowsWriter) -> dict[str, int]:
        assert not left.exists() and alive.exists()
        writer.add([([1, 2], [False, True])], origin=(0, 1))
        return {}

    open_or_build(tmp_path, kind="sft", fingerprint="f" * 32, segments=1, build=build, sources=["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, f"sft_{'f' * 20}"]
