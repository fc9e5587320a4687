"""One tensor as `torch.save` writes it: torch reads ours, we find the values in torch's, and nothing in one runs."""

from __future__ import annotations

import io
import pickle
import random
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_align.checkpoint.safe_reading import parse_metadata
from nemo_align.checkpoint.streaming.locations import Extent
from nemo_align.checkpoint.streaming.tensors import as_bytes
from nemo_align.checkpoint.streaming.torch_archive import Described, Wrapper, find_values
from nemo_align.checkpoint.streaming.torch_dist import TensorReader
from tests.bad_input_tally import tried
from tests.security import planted

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool)
SHAPES = ((1,), (5,), (3, 4), (1, 7), (2, 3, 4), ())


def tensor_of(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(max(1, torch.Size(shape).numel())) % 100).reshape(shape).to(dtype)


def wrapped(tensor: torch.Tensor) -> bytes:
    values = bytes(as_bytes(tensor))
    wrapper = Wrapper(tensor.dtype, tuple(tensor.shape))
    content = wrapper.head + values + wrapper.tail(zlib.crc32(values))
    assert len(content) == wrapper.num_bytes and len(wrapper.head) % 64 == 0
    return content


def saved(value: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def at(path: Path, content: bytes, *, before: bytes = b"") -> Extent:
    """The content inside a larger file."""
    path.write_bytes(before + content + b"behind")
    return Extent(str(path), len(before), len(content))


def values_of(found: Described) -> torch.Tensor:
    return torch.frombuffer(bytearray(found.values.read()), dtype=found.dtype).reshape(found.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_reads_ours(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = tensor_of(shape, dtype)
    content = wrapped(tensor)
    found = torch.load(io.BytesIO(content), weights_only=True)
    assert torch.equal(found, tensor) and found.dtype == dtype and found.shape == tensor.shape
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        assert opened.testzip() is None
    (tmp_path / "mapped").write_bytes(content)  # where torch maps the values they must be aligned
    assert torch.equal(torch.load(tmp_path / "mapped", weights_only=True, mmap=True), tensor)
    assert torch.equal(values_of(find_values(at(tmp_path / "x", content, before=b"before"))), tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_we_read_torchs(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = tensor_of(shape, dtype)
    found = find_values(at(tmp_path / "x", saved(tensor), before=bytes(100)))
    assert (found.dtype, found.shape) == (dtype, shape) and torch.equal(values_of(found), tensor)


def test_views_of_a_larger_storage(tmp_path: Path) -> None:
    whole = torch.arange(60.0).reshape(12, 5)
    for part in (whole[3:7], whole[11], whole[2:3, 1:4], whole[5, 2:4]):
        assert torch.equal(values_of(find_values(at(tmp_path / "x", saved(part)))), part)
    dcp.save({"rows": whole[3:7], "columns": whole[:, 1:3].t()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    reader = TensorReader(tmp_path / "dcp")
    assert torch.equal(reader.read("rows"), whole[3:7])
    with pytest.raises(ValueError, match=r"is refused at columns: its values are not stored row by row"):
        reader.read("columns")


@pytest.mark.parametrize("part", [lambda x: x.t(), lambda x: x[:, 1:3], lambda x: x[:1].expand(4, 5)])
def test_values_that_do_not_lie_row_by_row(part, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not stored row by row \(strides"):
        find_values(at(tmp_path / "x", saved(part(torch.arange(60.0).reshape(12, 5)))))


def test_an_archive_too_large_for_its_records() -> None:
    with pytest.raises(ValueError, match=r"a piece of 4,294,967,296 bytes is too large for one archive"):
        Wrapper(torch.float32, (1 << 30,))


# What is no such archive


def refused(content: bytes, path: Path) -> str:
    """The reason of the refusal, which never is another exception."""
    tried["torch archives"] += 1
    with pytest.raises(ValueError) as caught:
        find_values(at(path, content))
    assert str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", planted.PICKLES)
def test_planted_pickles_do_not_run(kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    refused(planted.PICKLES[kind](canary), tmp_path / "x")
    assert not canary.exists()


@pytest.mark.parametrize(
    "value",
    [
        {"a": torch.ones(2)}, [torch.ones(2)], 5, None, torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, requires_grad=True).to_sparse(), torch.ones(2, dtype=torch.complex64),
    ],
)  # fmt: skip
def test_what_is_no_plain_tensor(value: object, tmp_path: Path) -> None:
    refused(saved(value), tmp_path / "x")


@pytest.mark.parametrize("whose", ["ours", "torch's"])
def test_truncated_anywhere(whose: str, tmp_path: Path) -> None:
    tensor = tensor_of((9, 11), torch.bfloat16)
    content = wrapped(tensor) if whose == "ours" else saved(tensor)
    for length in range(0, len(content), 7):
        refused(content[:length], tmp_path / "x")
    refused(b"", tmp_path / "x")


@pytest.mark.parametrize("whose", ["ours", "torch's"])
def test_flipped_anywhere(whose: str, tmp_path: Path) -> None:
    """Each byte in turn: refused, or values that lie inside the archive."""
    tensor = tensor_of((4,), torch.float32)
    content = wrapped(tensor) if whose == "ours" else saved(tensor)
    randomly = random.Random(1)
    for position in range(len(content)):
        tried["torch archives"] += 1
        damaged = bytearray(content)
        damaged[position] ^= randomly.randrange(1, 256)
        archive = at(tmp_path / "x", bytes(damaged), before=b"12345")
        try:
            found = find_values(archive)
        except ValueError:
            continue
        assert archive.start <= found.values.start
        assert found.values.start + found.values.num_bytes <= archive.start + archive.num_bytes


def repacked(content: bytes, compression: int = zipfile.ZIP_STORED, **changes: bytes) -> bytes:
    """The same archive with other records."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            new.writestr(f"archive/{name}", changes.get(name, old.read(info)))
    return buffer.getvalue()


def test_compressed_encrypted_or_big_endian(tmp_path: Path) -> None:
    content = saved(torch.ones(200))
    assert "compressed" in refused(repacked(content, zipfile.ZIP_DEFLATED), tmp_path / "x")
    assert "big endian" in refused(repacked(content, byteorder=b"big"), tmp_path / "x")
    assert "big endian" in refused(repacked(content, byteorder=b"little" * 1000), tmp_path / "x")
    assert "too long" in refused(repacked(content, **{"data.pkl": bytes(5000)}), tmp_path / "x")
    assert "no data.pkl" in refused(repacked(content).replace(b"data.pkl", b"date.pkl"), tmp_path / "x")
    plain = bytearray(repacked(content))
    for sign, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = plain.find(sign)
        while start >= 0:
            plain[start + flags] |= 1  # encrypted
            start = plain.find(sign, start + 1)
    assert "encrypted" in refused(bytes(plain), tmp_path / "x")


def described(shape: object = (2,), stride: object = (1,), offset: object = 0, **storage: object) -> bytes:
    """An archive of 64 bytes of values whose description says something else."""
    kind = {"kind": "storage", "type": torch.FloatStorage, "key": "0", "place": "cpu", "count": 16} | storage

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return tuple(kind.values()) if value is Pickler else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Pickler, offset, shape, stride, False, {})

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(Tensor())
    return repacked(saved(torch.zeros(16)), **{"data.pkl": buffer.getvalue()})


def test_the_forger_below_forges(tmp_path: Path) -> None:
    assert find_values(at(tmp_path / "x", described())).shape == (2,)


@pytest.mark.parametrize(
    "forged",
    [
        {"shape": (17,)}, {"shape": (1 << 62,)}, {"shape": (1 << 40, 1 << 40), "stride": (1 << 40, 1)},
        {"shape": (-2,)}, {"shape": (2.0,)}, {"shape": (True,)}, {"shape": 2}, {"shape": "ab"}, {"shape": ((2,),)},
        {"stride": (2,)}, {"stride": ()}, {"stride": (1, 1)}, {"stride": (0,)}, {"stride": None},
        {"offset": 15}, {"offset": -1}, {"offset": 1 << 70}, {"offset": None},
        {"count": 15}, {"count": 1 << 62}, {"count": -1}, {"count": "16"}, {"count": None},
        {"kind": "module"}, {"type": torch.HalfStorage}, {"type": "FloatStorage"}, {"key": "1"}, {"key": None},
        {"key": "../../x"}, {"more": 1},
    ],
)  # fmt: skip
def test_descriptions_that_make_no_sense(forged: dict, tmp_path: Path) -> None:
    refused(described(**forged), tmp_path / "x")


def test_no_word_of_an_archive_takes_memory(tmp_path: Path) -> None:
    """A pickle of ten bytes, or a directory that claims gigabytes, in a sparse file that has them."""
    bomb = b"\x80\x02N" + b"r" + (100_000_000).to_bytes(4, "little") + b"."  # 1.6 GB, were it read
    deep = b"\x80\x02" + b"(" * 2000 + b"t" * 2000 + b"."
    claims = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, 3 << 30, 0, 0)
    (tmp_path / "sparse").touch()
    with open(tmp_path / "sparse", "r+b") as stream:
        stream.seek((4 << 30) - len(claims))
        stream.write(claims)
    tracemalloc.start()
    try:
        assert "would remember 100,000,000 things" in refused(
            repacked(saved(torch.ones(2)), **{"data.pkl": bomb}), tmp_path / "x"
        )
        refused(repacked(saved(torch.ones(2)), **{"data.pkl": deep}), tmp_path / "x")
        with pytest.raises(ValueError, match="it claims records of 3,221,225,472 bytes"):
            find_values(Extent(str(tmp_path / "sparse"), 0, 4 << 30))
        with pytest.raises(ValueError, match="would remember 100,000,000 things"):
            parse_metadata(bomb, tmp_path / ".metadata")
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
