"""Where the files of a checkpoint lie: in a folder, or inside an uncompressed tar archive, read in place.

Both answer with a path, an offset and a length, so that whoever reads bytes needs not know which it is. Nothing is
ever extracted, so no name in an archive can lead outside of it.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

_LARGEST_WHOLE_READ = 1 << 30  # headers, configurations and metadata are far smaller
_LONGEST_HEADER = 1 << 20  # of a tar member, with its name; people's names for files have some hundred bytes
_MOST_MEMBERS = 1 << 17  # the published checkpoints have some thousand
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstandard


@dataclass(frozen=True, slots=True)
class Extent:
    """`num_bytes` bytes of the file `path` from byte `start` on."""

    path: str
    start: int
    num_bytes: int

    def part(self, start: int, num_bytes: int) -> Extent:
        """A stretch of it; the caller has checked that it lies inside."""
        assert start >= 0 and start + num_bytes <= self.num_bytes, (self, start, num_bytes)
        return Extent(self.path, self.start + start, num_bytes)

    def read(self) -> bytes:
        """All of it, for small files.

        Raises:
            ValueError: it is too large to be what the caller takes it for, or ends early.
        """
        if self.num_bytes > _LARGEST_WHOLE_READ:
            raise ValueError(f"{self.path} has {self.num_bytes:,} bytes where a small file is expected")
        content = bytearray(self.num_bytes)
        read_into(self.path, self.start, memoryview(content))
        return bytes(content)


class Files(Protocol):
    """The files of a checkpoint by their name with '/' relative to its root."""

    root: Path

    def names(self) -> list[str]: ...

    def find(self, name: str) -> Extent | None: ...


class FolderFiles:
    """The files below a folder."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def names(self) -> list[str]:
        """Names of all files, sorted."""
        found = []
        for folder, _, files in os.walk(self.root):
            found += [(Path(folder) / file).relative_to(self.root).as_posix() for file in files]
        return sorted(found)

    def find(self, name: str) -> Extent | None:
        """Where a file lies; None if it is not there."""
        path = self.root / name
        try:
            return Extent(str(path), 0, path.stat().st_size) if path.is_file() else None
        except OSError:  # a name that no file can have
            return None


class TarFiles:
    """The members of an uncompressed tar archive.

    Raises:
        ValueError: not a tar archive, a compressed one, a name that leaves the archive, a link, a member beyond its
            end, or an archive that was cut off.
    """

    def __init__(self, path: Path | str) -> None:
        self.root = Path(path)
        self._members: dict[str, Extent] = {}
        if not self.root.is_file():  # reading a pipe would wait for ever
            raise ValueError(f"{path} is neither a folder nor a file")
        try:
            with open(self.root, "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                self._refuse_compressed(stream.read(6))
                stream.seek(0)
                for member in _members(self.root, stream):
                    self._add(member, size)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None

    def names(self) -> list[str]:
        """Names of all files, sorted."""
        return sorted(self._members)

    def find(self, name: str) -> Extent | None:
        """Where a file lies; None if it is not there."""
        return self._members.get(name)

    def _refuse_compressed(self, first: bytes) -> None:
        if first.startswith(_COMPRESSED):
            raise ValueError(
                f"{self.root} is a compressed archive, which cannot be read in place: unpack it with "
                f"`mkdir unpacked && tar -xf {self.root} -C unpacked` and name that folder"
            )

    def _add(self, member: tarfile.TarInfo, archive_size: int) -> None:
        if member.isdir():
            return
        if len(self._members) == _MOST_MEMBERS:
            raise ValueError(f"{self.root} is refused: it has more than {_MOST_MEMBERS:,} files")
        name = str(PurePosixPath(member.name))
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{self.root} is refused: the name {member.name!r} leaves the archive")
        if not member.isreg() or member.sparse is not None:
            raise ValueError(
                f"{self.root} is refused: {member.name!r} is a link, a device or a sparse file: pack it again with "
                "`tar --dereference --hard-dereference -cf`"
            )
        if name in self._members:
            raise ValueError(f"{self.root} is refused: it holds {name!r} twice")
        if member.size < 0 or member.offset_data + member.size > archive_size:
            raise ValueError(f"{self.root} ends in the middle of {name!r}: copy it again")
        self._members[name] = Extent(str(self.root), member.offset_data, member.size)


def _members(path: Path, stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The entries of an archive, up to the mark of its end; a truncated one may lack any, so the mark must be there."""
    try:
        with tarfile.open(fileobj=_Headers(stream), mode="r:") as archive:
            yield from archive
            end = archive.offset
    except Exception as error:  # damaged or malicious headers can raise anything
        raise ValueError(f"{path} is not a tar archive: {error}") from None
    stream.seek(end)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"{path} is damaged at byte {end:,}, or was cut off there: copy it again")


class _Headers:
    """What `tarfile` reads headers from. It takes their word for the length of a name: one could make it read all."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        return self._stream.read(size)


class ExtentStream(io.RawIOBase):
    """An extent as a file that can be read and searched, for libraries that want one."""

    def __init__(self, extent: Extent) -> None:
        self._extent = extent
        self._position = 0
        self._descriptor = os.open(extent.path, os.O_RDONLY)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._extent.num_bytes}[whence]
        if base + offset < 0:
            raise OSError(22, "a position before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._extent.num_bytes - self._position))
        count = os.preadv(self._descriptor, [view[:count]], self._extent.start + self._position) if count else 0
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def read_into(path: str, start: int, out: memoryview) -> None:
    """Fill `out` from byte `start` of a file, with positioned reads.

    Raises:
        ValueError: the file ends early or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fill(descriptor, path, start, out)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def fill(descriptor: int, path: str, start: int, out: memoryview) -> None:
    """`read_into` for a file that is open."""
    done = 0
    while done < len(out):
        try:
            count = os.preadv(descriptor, [out[done:]], start + done)
        except OSError as error:
            raise ValueError(f"{path} cannot be read at byte {start + done:,}: {error.strerror}") from None
        if count == 0:
            raise ValueError(
                f"{path} ends at byte {start + done:,}, {len(out) - done:,} bytes too early: it is damaged"
            )
        done += count
