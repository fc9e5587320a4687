"""Tensors as recipes: pieces cut anywhere give the whole, and what is made of other tensors is what torch makes."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_align.checkpoint.streaming import tensors as streaming
from nemo_align.checkpoint.streaming.locations import Extent, ExtentStream, FolderFiles, read_into
from nemo_align.checkpoint.streaming.tensors import (
    Converted,
    HeldTensor,
    Joined,
    Piece,
    Slice,
    StoredTensor,
    Zeros,
    as_bytes,
    converted,
    pieces_in,
    read,
    rows_of,
    scratch,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    values = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return values.view(dtype).reshape(shape)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit: NaN is equal to itself."""
    return a.dtype == b.dtype and a.shape == b.shape and bytes(as_bytes(a.contiguous())) == bytes(as_bytes(b))


def cut(size: int, randomly: random.Random, most: int = 4) -> list[tuple[int, int]]:
    """[0, size) in random stretches."""
    inner = sorted(randomly.sample(range(1, size), min(size - 1, randomly.randrange(most))))
    return list(itertools.pairwise([0, *inner, size]))


def store(tensor: torch.Tensor, folder: Path, randomly: random.Random) -> list[Piece]:
    """Write a tensor in random boxes of rows and columns, several to a file, out of order and with bytes between."""
    matrix = tensor.reshape(tensor.shape[0], -1)
    boxes = [
        (rows, columns)
        for rows in cut(matrix.shape[0], randomly)
        for columns in (cut(matrix.shape[1], randomly) if tensor.ndim > 1 else [(0, 1)])
    ]
    randomly.shuffle(boxes)
    files = [bytearray() for _ in range(randomly.randrange(1, 4))]
    pieces = []
    for (top, bottom), (left, right) in boxes:
        number = randomly.randrange(len(files))
        files[number] += randomly.randbytes(randomly.randrange(5))
        path = str(folder / f"{number}.bin")
        pieces.append(Piece(path, len(files[number]), top, bottom - top, left, right - left))
        files[number] += bytes(as_bytes(matrix[top:bottom, left:right].contiguous()))
    for number, content in enumerate(files):
        (folder / f"{number}.bin").write_bytes(content)
    return pieces


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 40)),
        st.tuples(st.integers(1, 20), st.integers(1, 20)),
        st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4)),
    ),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 30),
)
def test_pieces_cut_anywhere_are_the_whole(shape: tuple[int, ...], dtype: torch.dtype, seed: int, tmp_path) -> None:
    whole, randomly = random_tensor(shape, dtype, seed), random.Random(seed)
    stored = StoredTensor("x", shape, dtype, store(whole, tmp_path, randomly))
    assert same(read(stored), whole)
    for first, last in itertools.combinations_with_replacement(range(shape[0] + 1), 2):
        assert same(read(stored, first, last), whole[first:last])
    if len(shape) == 2:
        for _ in range(10):
            rows, columns = (slice(*sorted(randomly.choices(range(size + 1), k=2))) for size in (shape[0], shape[1]))
            assert same(stored.read_box(rows, columns), whole[rows, columns].contiguous())


def test_a_box_of_one_piece(tmp_path: Path) -> None:
    whole = random_tensor((7, 9), torch.bfloat16, 1)
    (tmp_path / "x").write_bytes(b"head" + bytes(as_bytes(whole)))
    stored = StoredTensor("x", (7, 9), torch.bfloat16, [Piece(str(tmp_path / "x"), 4, 0, 7, 0, 9)])
    for rows, columns in itertools.product([slice(0, 7), slice(2, 3), slice(4, 4)], [slice(0, 9), slice(3, 8)]):
        assert same(stored.read_box(rows, columns), whole[rows, columns].contiguous())


def piece(row: int, rows: int, column: int = 0, columns: int = 4) -> Piece:
    return Piece(f"{row}-{column}", 0, row, rows, column, columns)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([], r"x \[6, 4\] has 24 values, its pieces hold 0: the checkpoint is damaged or was not copied whole"),
        ([piece(0, 5)], "its pieces hold 20"),
        ([piece(0, 3), piece(4, 2)], "its pieces hold 20"),
        ([piece(0, 6), piece(0, 6)], "hold the same part of x"),
        ([piece(0, 4), piece(3, 3)], "0-0 and 3-0 hold the same part of x"),
        ([piece(0, 6, 0, 3), piece(0, 6, 2, 2)], "0-0 and 0-2 hold the same part"),
        # As many values as the tensor has, and yet a hole.
        ([piece(0, 3, 0, 2), piece(0, 3, 1, 2), piece(3, 3)], "0-0 and 0-1 hold the same part"),
        ([piece(0, 6, 0, 2), piece(1, 2, 0, 2), piece(0, 4, 2, 2)], "hold the same part"),
        ([piece(0, 7)], r"0-0 holds a piece that lies outside of x \[6, 4\]"),
        ([piece(0, 6, 1, 4)], "lies outside"),
        ([piece(-1, 7)], "lies outside"),
        ([piece(0, 6, -1, 5)], "lies outside"),
        ([piece(0, -6)], "lies outside"),
    ],
)
def test_overlaps_and_gaps_are_refused(pieces: list[Piece], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoredTensor("x", (6, 4), torch.float32, pieces)


def test_files_that_end_early_or_are_gone(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(23 * 4))
    stored = StoredTensor("w", (6, 4), torch.float32, [Piece(str(tmp_path / "x"), 0, 0, 6, 0, 4)])
    assert read(stored, 0, 5).shape == (5, 4)
    with pytest.raises(ValueError, match=r"x ends at byte 92, 4 bytes too early: it is damaged"):
        read(stored)
    (tmp_path / "x").unlink()
    with pytest.raises(ValueError, match=r"w cannot be read from .*x: No such file"):
        read(stored)
    with pytest.raises(ValueError, match=r"w cannot be read from .*x: No such file"):
        stored.read_box(slice(0, 2), slice(1, 3))
    (tmp_path / "x").mkdir()
    with pytest.raises(ValueError, match=r"x cannot be read at byte 0: Is a directory"):
        read(stored)
    with pytest.raises(ValueError, match=r"x cannot be read at byte 0: Is a directory"):
        read_into(str(tmp_path / "x"), 0, memoryview(bytearray(1)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_rows_joined_from_anywhere(seed: int) -> None:
    randomly = random.Random(seed)
    sources = [random_tensor((randomly.randrange(1, 9), 3), torch.bfloat16, seed + number) for number in range(3)]
    held = [HeldTensor(source) for source in sources]
    slices, expected = [], []
    for _ in range(randomly.randrange(1, 9)):
        which = randomly.randrange(3)
        first, last = sorted(randomly.choices(range(len(sources[which]) + 1), k=2))
        slices.append(Slice(held[which], first, last))
        expected.append(sources[which][first:last])
    slices.append(Slice(Zeros((4, 3), torch.bfloat16), 1, 3))
    expected.append(torch.zeros(2, 3, dtype=torch.bfloat16))
    joined, whole = Joined(slices), torch.cat(expected)
    assert joined.shape == tuple(whole.shape)
    for first, last in itertools.combinations_with_replacement(range(len(whole) + 1), 2):
        assert same(read(joined, first, last), whole[first:last])
    part = rows_of(joined, 1, len(whole))
    assert same(read(part), whole[1:]) and rows_of(joined, 0, len(whole)) is joined


def test_zeros_overwrite_what_was_in_the_buffer() -> None:
    out = torch.full((2, 3), 7.0)
    Zeros((9, 3), torch.float32).read_rows(4, 6, as_bytes(out))
    assert not out.any()


def test_every_source_is_found_behind_a_recipe() -> None:
    stored = StoredTensor("x", (6, 4), torch.bfloat16, [Piece("a", 0, 0, 6, 0, 4)])
    recipe = converted(Joined([Slice(stored, 0, 2), Slice(Zeros((1, 4), torch.bfloat16), 0, 1)]), torch.float32, "x")
    assert list(pieces_in(recipe)) == [(stored.pieces[0], 2)]


# Number formats


def all_kinds_of_floats() -> torch.Tensor:
    """Random bits, and every case of rounding to bfloat16: halfway, above, below, subnormal, signed zero, NaN."""
    generator = torch.Generator().manual_seed(3)
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (5000,), generator=generator, dtype=torch.int64).to(torch.int32)
    halves = (torch.arange(-40, 40, dtype=torch.int32) << 16) + 0x3F80_0000
    edges = torch.tensor([0, -(1 << 31), 1, 0x7FC0_0000, 0x7F80_0001, -1, 0x7F80_0000, 0x0080_0000, 0x007F_FFFF])
    bits = torch.cat([bits, halves + 0x8000, halves + 0x7FFF, halves + 0x8001, edges.to(torch.int32)])
    values = bits.view(torch.float32)
    largest = torch.finfo(torch.bfloat16).max
    return values[~((values.abs() > largest) & values.isfinite())].reshape(-1, 1)


def test_rounding_is_torchs() -> None:
    values = all_kinds_of_floats()
    found = read(Converted(HeldTensor(values), torch.bfloat16, "x"))
    expected = values.bfloat16()
    assert torch.equal(found.isnan(), values.isnan()) and values.isnan().sum() > 5
    assert same(found.nan_to_num(), expected.nan_to_num())
    assert torch.equal(found.isinf(), values.isinf()) and values.isinf().any()
    back = read(Converted(HeldTensor(found), torch.float32, "x"))
    assert same(back.nan_to_num(), found.float().nan_to_num())
    held = HeldTensor(values)
    assert converted(held, torch.float32, "x") is held


@pytest.mark.parametrize("value", [3.4e38, -3.3961775e38])
def test_values_that_would_become_infinite_are_refused(value: float) -> None:
    source = HeldTensor(torch.tensor([[1.0], [value]]))
    assert same(read(Converted(source, torch.bfloat16, "w"), 0, 1), torch.ones(1, 1).bfloat16())
    with pytest.raises(ValueError, match=r"w holds -?3\.\d+e\+38, too large for torch\.bfloat16"):
        read(Converted(source, torch.bfloat16, "w"))
    with pytest.raises(ValueError, match=r"too large for torch\.float16"):
        read(Converted(HeldTensor(torch.tensor([70000.0]).bfloat16()), torch.float16, "w"))


def test_buffers_are_used_again_and_never_twice_at_once() -> None:
    with scratch(100) as outer:
        outer[:] = b"a" * 100
        with scratch(200) as inner:
            inner[:] = b"b" * 200
        with scratch(50) as again:
            assert bytes(again) == b"b" * 50
            again[:] = b"c" * 50
        assert bytes(outer) == b"a" * 100
    with pytest.raises(RuntimeError), scratch(10):
        raise RuntimeError
    streaming.release_scratch()
    with scratch(0) as empty:
        assert len(empty) == 0


# Files


def test_a_stretch_of_a_file_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(100)))
    with ExtentStream(Extent(str(tmp_path / "x"), 10, 50)) as stream:
        assert stream.read() == bytes(range(10, 60)) and stream.read() == b""
        assert stream.seek(-3, 2) == 47 and stream.read(10) == bytes(range(57, 60))
        assert stream.seek(5) == 5 and stream.seek(2, 1) == 7 and stream.tell() == 7 and stream.read(1) == b"\x11"
        assert stream.seek(500) == 500 and stream.read(3) == b""
        with pytest.raises(OSError, match="before the beginning"):
            stream.seek(-1)
    with pytest.raises(ValueError, match=r"x has 2,147,483,648 bytes where a small file is expected"):
        Extent(str(tmp_path / "x"), 0, 1 << 31).read()


def test_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / ".b").mkdir(parents=True)
    (tmp_path / "a" / ".b" / "c").write_bytes(b"123")
    (tmp_path / "d").write_bytes(b"")
    files = FolderFiles(tmp_path)
    assert files.names() == ["a/.b/c", "d"]
    found = files.find("a/.b/c")
    assert found is not None and found.read() == b"123" and found.part(1, 2).read() == b"23"
    for name in ("", "a", "a/.b", "nowhere", "d/x", "x" * 300, "a\0b"):
        assert files.find(name) is None
