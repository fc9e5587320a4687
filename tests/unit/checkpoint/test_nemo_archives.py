"""Packed `.nemo` archives that are damaged or made to harm: refused, nothing is extracted, no header takes memory."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from nemo_align.checkpoint.nemo.open import open_nemo
from nemo_align.checkpoint.streaming.locations import TarFiles
from tests.bad_input_tally import tried
from tests.nemo_files import Nemo, refused


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]], path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("../x"), "'../x' leaves the archive"),
        (member("a/../../x"), "leaves the archive"),
        (member("/etc/x"), "'/etc/x' leaves the archive"),
        (member("./a/.."), "leaves the archive"),
        (member("x", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'x' is a link"),
        (member("x", type=tarfile.LNKTYPE, linkname="model_config.yaml"), "'x' is a link"),
        (member("x", type=tarfile.FIFOTYPE), "a device"),
        (member("x", type=tarfile.CHRTYPE), "a device"),
        (member("x", type=b"Z"), "a link, a device"),
        (member("model_config.yaml"), "holds 'model_config.yaml' twice"),
        (member(".//model_config.yaml"), "holds 'model_config.yaml' twice"),
    ],
)
def test_members_that_lead_elsewhere(info: tarfile.TarInfo, message: str, tmp_path: Path) -> None:
    path = tar_of([(member("model_config.yaml"), b"{}"), (info, b"")], tmp_path / "x.nemo")
    refused(path, message)
    assert [path.name for path in tmp_path.iterdir()] == ["x.nemo"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_compressed_archives(mode: str, nemo: Nemo, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.nemo", mode) as archive:
        archive.add(nemo.path, ".")
    refused(tmp_path / "x.nemo", r"is a compressed archive, .*unpack it with `mkdir unpacked && tar -xf .*x\.nemo")


def test_archives_that_are_none(tmp_path: Path) -> None:
    for content in (b"", b"x", b"no archive" * 1000, pickle.dumps([1]), b"PK\x03\x04" + bytes(600)):
        (tmp_path / "x.nemo").write_bytes(content)
        refused(tmp_path / "x.nemo", "is not a tar archive")
    (tmp_path / "x.nemo").write_bytes(bytes(10240))
    refused(tmp_path / "x.nemo", "has no model_config.yaml")


def test_truncated_archives(reward: Nemo, tmp_path: Path) -> None:
    """Wherever it is cut; the head of the reward model lies near the end and must not be missed in silence."""
    path = reward.pack(tmp_path / "x.nemo")
    content = path.read_bytes()
    used = len(content.rstrip(b"\0"))
    cuts = {*range(0, used, 997), *range(0, used, 512 * 7), used - 1, -(-used // 512) * 512}
    for length in sorted(cuts):
        path.write_bytes(content[:length])
        refused(path)
    path.write_bytes(content[: -(-used // 512) * 512 + 512])  # one block of zeros ends it
    assert open_nemo(path).reward is not None


def test_headers_flipped_anywhere(nemo: Nemo, tmp_path: Path) -> None:
    content = nemo.pack(tmp_path / "x.nemo").read_bytes()
    with tarfile.open(tmp_path / "x.nemo") as archive:
        headers = [info.offset for info in archive]
    randomly, said = random.Random(3), []
    for _ in range(120):
        tried[".nemo"] += 1
        damaged = bytearray(content)
        header = randomly.choice(headers)
        damaged[header + randomly.randrange(260)] ^= randomly.randrange(1, 256)
        if randomly.random() < 0.7:  # with a checksum that agrees, as somebody who means harm writes it
            block = damaged[header : header + 512]
            block[148:156] = b" " * 8
            damaged[header + 148 : header + 156] = b"%06o\0 " % sum(block)
        (tmp_path / "x.nemo").write_bytes(damaged)
        try:
            open_nemo(tmp_path / "x.nemo")
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 30 and all(str(tmp_path) in one for one in said)


def header(name: bytes, size: bytes, kind: bytes) -> bytes:
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def binary(size: int) -> bytes:
    """A size in base 256, which may be negative."""
    return (b"\xff" if size < 0 else b"\x80") + (size % (1 << 88)).to_bytes(11, "big")


@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S"])
@pytest.mark.parametrize("size", [-512, -1024, -(1 << 40), 1 << 34, 1 << 62, 1 << 80])
def test_sizes_in_headers_take_no_memory(kind: bytes, size: int, tmp_path: Path) -> None:
    if (kind, size) == (b"0", 1 << 34):
        return  # a file of 16 GB is one
    path = tmp_path / "x.nemo"
    path.write_bytes(header(b"a", b"00000000000\0", b"0") + header(b"x", binary(size), kind) + bytes(10240))
    os.truncate(path, 1 << 35)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"x\.nemo"):
            TarFiles(path)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_headers_of_headers(tmp_path: Path) -> None:
    """Long names of long names, thousands of times; records of extended headers that make no sense."""
    path = tmp_path / "x.nemo"
    long = header(b"x", b"00000000010\0", b"L") + b"name".ljust(512, b"\0")
    path.write_bytes(long * 3000 + header(b"a", b"00000000000\0", b"0") + bytes(1024))
    refused(path, "is not a tar archive")
    for record in (
        b"20 size=-100000000\n",
        b"19 size=1000000000\n",
        b"99999999 x=\n",
        b"0 a=b\n",
        b"15 path=../../x\n",
    ):
        extended = header(b"x", b"%011o\0" % len(record), b"x") + record.ljust(512, b"\0")
        path.write_bytes(extended + header(b"a", b"00000000000\0", b"0") + bytes(1024))
        refused(path)
    path.write_bytes(struct.pack("512s", b"") + b"x" * 512)
    refused(path, "has no model_config.yaml|damaged")
