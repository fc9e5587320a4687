"""Pickles that would bring the process down are refused from their opcodes; ordinary ones pass, of any protocol."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_align.checkpoint.pickle_limits import MOST_NESTED, refuse_bombs
from nemo_align.checkpoint.safe_reading import read_metadata

LEAVES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5) | st.floats()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner)
)


@dataclass
class Thing:
    name: str
    parts: list


@given(VALUES, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_ordinary_pickles_pass(value: object, protocol: int) -> None:
    refuse_bombs(pickle.dumps(value, protocol))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_long_ones_are_not_deep(protocol: int) -> None:
    shared = Thing("a", [1, (2, {3})])
    many = {f"key {number}": (Thing("b", [shared, OrderedDict(x=number)]), shared) for number in range(3000)}
    refuse_bombs(pickle.dumps(many, protocol))
    refuse_bombs(b"(l" + b"I1\na" * 5000 + b".")  # appended one by one


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x04N" + b"\x85" * 2000 + b".",
        b"\x80\x04}N" + b"\x85" * 5_000_000 + b"Ns.",  # hashed as a key, this ends the process
        b"\x80\x04N\x94" + b"h\x00\x85" + b"N\x86" * 2000 + b".",
        b"\x80\x04" + b"(" * 2000 + b"N" + b"t" * 2000 + b".",
        b"\x80\x04N" + b"".join(b"\x85\x94" for _ in range(2000)) + b".",
    ],
    ids=["tuples", "key", "pairs", "marked", "remembered"],
)
def test_deep_ones_are_refused(pickled: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"nests more than {MOST_NESTED:,}"):
        refuse_bombs(pickled)
    (tmp_path / ".metadata").write_bytes(pickled)
    with pytest.raises(ValueError, match=r"\.metadata is refused: it nests"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("pickled", [b"0.", b"t.", b"\x80\x04\x94.", b"s.", b"(\x94."])
def test_what_takes_from_an_empty_stack_is_refused(pickled: bytes) -> None:
    with pytest.raises(ValueError, match=r"it takes more|it remembers nothing"):
        refuse_bombs(pickled)
