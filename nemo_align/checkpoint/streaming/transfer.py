"""Making files part by part: several workers, a checksum of each part, a journal by which a killed run goes on.

A part is a stretch of a target file that fits into a small buffer: the header of a file, or a slab of a tensor's rows.
Parts of a file follow each other without gaps, and their checksums become the file's entry in a manifest.

What the journal says is done is on disk: parts are forced there before their lines are. So neither a kill nor a power
cut leaves a line for a part that is not whole.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_align.checkpoint import checksums
from nemo_align.checkpoint.streaming.tensors import RowSource, row_bytes, scratch
from nemo_align.checkpoint.streaming.torch_archive import Wrapper

PART_BYTES = 32 << 20
_SLAB_BYTES = 1 << 20
_LONGEST_ROW = 4 << 20
# Of a worker: its slab, the same rows in a wider number format, one column piece of those, and a second tensor's rows.
_WORKER_BYTES = 6 * _LONGEST_ROW
_PROCESS_BYTES = 450 << 20  # the interpreter and torch
_MOST_WORKERS = 8
_SYNC_BYTES, _SYNC_SECONDS = 1 << 30, 3.0
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Part:
    """Bytes [start, start + num_bytes) of a target file: fixed ones, or rows of a tensor, plain or as an archive."""

    file: str
    start: int
    num_bytes: int
    label: str
    content: bytes | None = None
    source: RowSource | None = None
    first: int = 0
    last: int = 0
    wrapper: Wrapper | None = None


def fixed(file: str, content: bytes) -> Part:
    """The beginning of a file whose bytes are known."""
    return Part(file, 0, len(content), file, content=content)


def rows(file: str, start: int, name: str, source: RowSource, first: int, last: int) -> Part:
    """Rows of a tensor, as they are."""
    return Part(file, start, (last - first) * row_bytes(source), name, source=source, first=first, last=last)


def archive(file: str, start: int, name: str, source: RowSource, first: int, last: int, wrapper: Wrapper) -> Part:
    """Rows of a tensor, as `torch.save` would write them."""
    return Part(file, start, wrapper.num_bytes, name, source=source, first=first, last=last, wrapper=wrapper)


@dataclass(frozen=True)
class Check:
    """A stretch of a source file whose checksum is known, compared beside the work."""

    path: Path
    name: str
    first: int
    end: int
    algorithm: str
    digest: str


def num_workers(max_memory: int, wanted: int | None = None) -> int:
    """How many workers fit into `max_memory` bytes of anonymous memory.

    Raises:
        ValueError: not even one.
    """
    if max_memory < _PROCESS_BYTES + _WORKER_BYTES:
        least = -(-(_PROCESS_BYTES + _WORKER_BYTES) // 10**6)
        raise ValueError(f"max_memory is {max_memory / 1e6:.0f} MB, at least {least} MB are needed: raise it")
    fitting = (max_memory - _PROCESS_BYTES) // _WORKER_BYTES
    return max(1, min(fitting, _MOST_WORKERS, wanted or 2 * (os.cpu_count() or 1)))


class Journal:
    """Which parts are done, with their checksums, in a file beside them. Only one process may hold it."""

    def __init__(self, path: Path, job: str) -> None:
        """`job` identifies what is being made; a journal of another job is begun anew.

        Raises:
            ValueError: another process holds it.
        """
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems lock nothing; then two commands at once are the user's to avoid.
            busy = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
        else:
            busy = False
        if busy:
            os.close(self._descriptor)
            raise ValueError(f"another process is writing {path.parent}: wait for it or stop it") from None
        self.done: dict[int, str] = {}
        kept = self._read(path, job)
        os.ftruncate(self._descriptor, kept)
        os.lseek(self._descriptor, kept, os.SEEK_SET)
        if not kept:
            self._write([json.dumps({"job": job})])

    def add(self, done: Iterable[tuple[int, str]]) -> None:
        """Note parts that are on disk."""
        done = list(done)
        self.done.update(done)
        self._write([json.dumps(pair) for pair in done])

    def close(self) -> None:
        """Let go of the file; again is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, lines: list[str]) -> None:
        content = "".join(line + "\n" for line in lines).encode()
        while content:
            content = content[os.write(self._descriptor, content) :]
        os.fdatasync(self._descriptor)

    def _read(self, path: Path, job: str) -> int:
        """Length of what holds: up to the first line that a kill cut off."""
        kept = 0
        with open(path, "rb") as stream:
            for number, line in enumerate(stream):
                try:
                    value = json.loads(line)
                    if not line.endswith(b"\n") or (number == 0 and value != {"job": job}):
                        break
                    if number:
                        part, digest = value
                        self.done[part] = digest
                except (ValueError, TypeError):  # bytes that a power cut left
                    break
                kept += len(line)
        return kept


class Progress:
    """Told of every part, from any worker. This one says nothing."""

    def begin(self, total: int, done: int) -> None:
        """`done` of `total` bytes are there from before."""

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are written."""

    def end(self) -> None:
        """All is done, or nothing goes on."""


def make(
    folder: Path,
    parts: Sequence[Part],
    journal: Journal,
    *,
    workers: int,
    algorithm: str = checksums.BLAKE3,
    checks: Sequence[Check] = (),
    progress: Progress | None = None,
    beat: Callable[[str], None] = lambda _: None,
) -> dict[str, dict]:
    """Write the parts that the journal lacks into files in `folder`; returns the manifest's entry of each file.

    Args:
        checks: stretches of the source to verify meanwhile.
        beat: called from this thread at least every few seconds, with what was last done.

    Raises:
        ValueError: a source that is damaged or cannot be read, a disk that is full. What was done stays for the next
            time.
    """
    progress = progress or Progress()
    for part in parts:
        if part.source is not None and row_bytes(part.source) > _LONGEST_ROW:
            raise ValueError(
                f"{part.label} has rows of {row_bytes(part.source):,} bytes, at most {_LONGEST_ROW:,} are read"
            )
    sizes = sizes_of(parts)
    _forget_lost(folder, parts, sizes, journal)
    missing = [number for number in range(len(parts)) if number not in journal.done]
    progress.begin(sum(part.num_bytes for part in parts), sum(parts[number].num_bytes for number in journal.done))
    for file, size in sizes.items():
        _reserve(folder / file, size)
    work = _Work(folder, parts, algorithm, _interleaved(missing, checks), progress)
    threads = [threading.Thread(target=work.run, name=f"transfer {n}", daemon=True) for n in range(workers)]
    for thread in threads:
        thread.start()
    try:
        _collect(work, threads, journal, beat)
    finally:
        work.stop.set()
        for thread in threads:
            thread.join()
        work.save_done(journal)  # what was finished while the error came up
        progress.end()
    if work.problems:
        raise ValueError("; ".join(sorted(work.problems)[:3]))
    return entries(parts, journal.done, algorithm)


def _forget_lost(folder: Path, parts: Sequence[Part], sizes: dict[str, int], journal: Journal) -> None:
    """Do again what stood in a file that somebody has removed or cut off since."""

    def is_whole(file: str) -> bool:
        return (folder / file).is_file() and (folder / file).stat().st_size == sizes[file]

    whole = {file for file in sizes if is_whole(file)}
    journal.done = {number: digest for number, digest in journal.done.items() if parts[number].file in whole}


def sizes_of(parts: Sequence[Part]) -> dict[str, int]:
    """Length of each file."""
    sizes: dict[str, int] = {}
    for part in parts:
        sizes[part.file] = max(sizes.get(part.file, 0), part.start + part.num_bytes)
    return sizes


def entries(parts: Sequence[Part], done: dict[int, str], algorithm: str) -> dict[str, dict]:
    """The manifest's entry of each file that the parts make up."""
    ends: dict[str, list] = {}
    for number, part in enumerate(parts):
        ends.setdefault(part.file, []).append([part.start + part.num_bytes, done[number]])
    return {
        file: checksums.entry(max(end for end, _ in pairs), sorted(pairs), algorithm) for file, pairs in ends.items()
    }


def _interleaved(missing: list[int], checks: Sequence[Check]) -> Iterator[int | Check]:
    """Checks spread evenly between the parts: both go through the source from its beginning to its end, so what one
    has read is often still in memory for the other."""
    pending = 0.0
    queued = iter(checks)
    for number in missing:
        pending += len(checks) / len(missing)
        while pending >= 1:
            pending -= 1
            if (check := next(queued, None)) is not None:
                yield check
        yield number
    yield from queued


class _Work:
    """What workers and the collecting thread share."""

    def __init__(
        self, folder: Path, parts: Sequence[Part], algorithm: str, tasks: Iterator[int | Check], progress: Progress
    ) -> None:
        self.folder, self.parts, self.algorithm, self.progress = folder, parts, algorithm, progress
        self.stop = threading.Event()
        self.results: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self.errors: list[BaseException] = []
        self.problems: list[str] = []
        self._tasks, self._lock = tasks, threading.Lock()

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                with self._lock:
                    task = next(self._tasks, None)
                if task is None:
                    return
                if isinstance(task, Check):
                    self._check(task)
                else:
                    part = self.parts[task]
                    self.results.put((task, write(part, self.folder, self.algorithm)))
                    self.progress.advance(part.num_bytes)
        except BaseException as error:  # handed to the collecting thread
            self.errors.append(error)
            self.stop.set()

    def save_done(self, journal: Journal) -> None:
        """Force finished parts to disk, then note them."""
        done = []
        while not self.results.empty():
            done.append(self.results.get())
        try:
            for file in sorted({self.parts[number].file for number, _ in done}):
                _force(self.folder / file)
            if done:
                journal.add(done)
        except OSError as error:
            raise cannot_go_on(error, self.folder) from None

    def _check(self, check: Check) -> None:
        problem = checksums.problem_of_part(
            check.path, check.name, check.first, check.end, check.algorithm, check.digest
        )
        if problem is not None:
            self.problems.append(f"{check.path}: {problem}")
            self.stop.set()


def _collect(work: _Work, threads: list[threading.Thread], journal: Journal, beat: Callable[[str], None]) -> None:
    last = time.monotonic()
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(_POLL_SECONDS / len(threads))
        beat(f"writing {work.folder}")
        waiting = work.results.qsize() * PART_BYTES
        if waiting and (waiting > _SYNC_BYTES or time.monotonic() - last > _SYNC_SECONDS):
            work.save_done(journal)
            last = time.monotonic()
    for error in work.errors:
        if isinstance(error, OSError):
            raise cannot_go_on(error, work.folder) from None
        raise error


def write(part: Part, folder: Path, algorithm: str) -> str:
    """Put one part into its file; returns its checksum."""
    running = checksums.new_hash(algorithm)
    descriptor = os.open(folder / part.file, os.O_WRONLY | os.O_CLOEXEC)
    try:
        position = part.start
        for chunk in _chunks_of(part):
            running.update(chunk)
            position = _write_all(descriptor, chunk, position)
        assert position == part.start + part.num_bytes, part
    finally:
        os.close(descriptor)
    return running.hexdigest()


def _chunks_of(part: Part) -> Iterator[bytes | memoryview]:
    """The bytes of a part in order. Rows come a few at a time: what fits into a core's cache is copied into and out of
    the kernel, hashed and summed without a way to main memory in between."""
    if part.source is None:
        assert part.content is not None
        yield part.content
        return
    crc = 0
    if part.wrapper is not None:
        yield part.wrapper.head
    for values in blocks(part.source, part.first, part.last):
        if part.wrapper is not None:
            crc = zlib.crc32(values, crc)
        yield values
    if part.wrapper is not None:
        yield part.wrapper.tail(crc)


def blocks(source: RowSource, first: int, last: int) -> Iterator[memoryview]:
    """Rows [first, last) of a source, about a MiB at a time, each block in the same buffer as the one before."""
    width = row_bytes(source)
    step = max(1, _SLAB_BYTES // width)
    for begin in range(first, last, step):
        end = min(begin + step, last)
        with scratch((end - begin) * width) as values:
            source.read_rows(begin, end, values)
            yield values


def _write_all(descriptor: int, chunk: bytes | memoryview, position: int) -> int:
    left = memoryview(chunk)
    while left:
        count = os.pwrite(descriptor, left, position)
        left, position = left[count:], position + count
    return position


def _reserve(path: Path, size: int) -> None:
    """Give a file its length and, where the file system can, its blocks: parts are then written several times faster
    (ext4), and a full disk shows before the work.

    Through the system call itself: `os.posix_fallocate` writes to every block where the file system cannot.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if size and _fallocate(descriptor, 0, 0, size) != 0:
                error = ctypes.get_errno()
                if error not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    raise OSError(error, os.strerror(error), str(path))
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise cannot_go_on(error, path.parent) from None


_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _force(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def cannot_go_on(error: OSError, folder: Path) -> ValueError:
    """The error for a disk that is full or cannot be written, with what to do."""
    where = error.filename or folder
    return ValueError(
        f"{where}: {error.strerror}. What is done is kept: mend that and start the same command again, and it goes on"
    )
