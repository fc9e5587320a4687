"""Files made part by part: what ends early goes on, to the same bytes, and does nothing twice."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from nemo_align.checkpoint import checksums
from nemo_align.checkpoint.conversion.workplace import Workplace
from nemo_align.checkpoint.streaming import transfer
from nemo_align.checkpoint.streaming.tensors import HeldTensor, num_bytes
from nemo_align.checkpoint.streaming.transfer import Check, Journal, Part, Progress
from tests.faults.disks import disk

ROWS, WIDTH, PARTS = 40, 8, 10


class Counted:
    """A tensor that counts the rows read from it, and may end as a disk or a user ends a run."""

    def __init__(self, tensor: torch.Tensor, *, fail_after: int | None = None, error: BaseException | None = None):
        self._held, self._lock = HeldTensor(tensor), threading.Lock()
        self.shape, self.dtype = self._held.shape, self._held.dtype
        self.read: list[tuple[int, int]] = []
        self._fail_after, self._error = fail_after, error

    def read_rows(self, first: int, last: int, out: memoryview) -> None:
        with self._lock:
            if self._fail_after is not None and len(self.read) >= self._fail_after:
                assert self._error is not None
                raise self._error
            self.read.append((first, last))
        self._held.read_rows(first, last, out)


def values() -> torch.Tensor:
    return torch.arange(float(ROWS * WIDTH)).reshape(ROWS, WIDTH)


def parts_of(source) -> list[Part]:
    """Two files: fixed bytes and half of the rows in each."""
    parts: list[Part] = []
    step = ROWS // PARTS
    for number in range(PARTS):
        file = "a" if number < PARTS // 2 else "b"
        if number % (PARTS // 2) == 0:
            parts.append(transfer.fixed(file, b"head of " + file.encode()))
        start = parts[-1].start + parts[-1].num_bytes
        parts.append(transfer.rows(file, start, "x", source, number * step, (number + 1) * step))
    return parts


def expected() -> dict[str, bytes]:
    raw = values().numpy().tobytes()
    half = len(raw) // 2
    return {"a": b"head of a" + raw[:half], "b": b"head of b" + raw[half:]}


def make(folder: Path, source, *, workers: int = 1, **options):
    folder.mkdir(exist_ok=True)
    journal = Journal(folder.with_name("journal"), "job")
    try:
        return transfer.make(folder, parts_of(source), journal, workers=workers, **options)
    finally:
        journal.close()


def is_whole(folder: Path, entries: dict[str, dict]) -> bool:
    for name, content in expected().items():
        if (folder / name).read_bytes() != content or checksums.problem_of(folder / name, name, entries[name]):
            return False
        if not checksums.is_entry(entries[name]):
            return False
    return True


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("algorithm", checksums.ALGORITHMS)
def test_what_is_written(workers: int, algorithm: str, tmp_path: Path) -> None:
    entries = make(tmp_path / "out", Counted(values()), workers=workers, algorithm=algorithm)
    assert is_whole(tmp_path / "out", entries)
    if algorithm == checksums.BLAKE3:
        assert entries["a"]["blake3"][0] == [9, blake3(b"head of a").hexdigest()]


def test_archives(tmp_path: Path) -> None:
    wrapper = transfer.Wrapper(torch.float32, (3, WIDTH))
    part = transfer.archive("x", 0, "x", HeldTensor(values()), 2, 5, wrapper)
    journal = Journal(tmp_path / "journal", "job")
    transfer.make(tmp_path, [part], journal, workers=1)
    journal.close()
    assert torch.equal(torch.load(tmp_path / "x", weights_only=True), values()[2:5])


@pytest.mark.parametrize("after", range(PARTS))
@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_that_ends_early_goes_on(after: int, workers: int, tmp_path: Path) -> None:
    first = Counted(values(), fail_after=after, error=RuntimeError("struck"))
    with pytest.raises(RuntimeError, match="struck"):
        make(tmp_path / "out", first, workers=workers)
    again = Counted(values())
    entries = make(tmp_path / "out", again, workers=workers)
    assert is_whole(tmp_path / "out", entries)
    assert sorted(first.read + again.read) == [(n, n + 4) for n in range(0, ROWS, 4)]  # none twice
    last = Counted(values())
    assert make(tmp_path / "out", last, workers=workers) == entries and last.read == []


def test_what_was_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    entries = make(tmp_path / "out", Counted(values()))
    for damage in (lambda path: path.unlink(), lambda path: os.truncate(path, 30)):
        damage(tmp_path / "out" / "b")
        again = Counted(values())
        assert make(tmp_path / "out", again) == entries and is_whole(tmp_path / "out", entries)
        assert min(again.read) == (ROWS // 2, ROWS // 2 + 4) and len(again.read) == PARTS // 2


class Recorded(Progress):
    def __init__(self) -> None:
        self.total = self.done = self.ends = 0

    def begin(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes

    def end(self) -> None:
        self.ends += 1


def test_progress_counts_what_was_done_before(tmp_path: Path) -> None:
    size = sum(map(len, expected().values()))
    first, second = Recorded(), Recorded()
    with pytest.raises(RuntimeError):
        make(tmp_path / "out", Counted(values(), fail_after=3, error=RuntimeError("struck")), progress=first)
    beats: list[str] = []
    make(tmp_path / "out", Counted(values()), progress=second, beat=beats.append)
    assert first.total == second.total == second.done == size and first.done == 9 + 3 * 4 * WIDTH * 4
    assert first.ends == second.ends == 1 and all(str(tmp_path / "out") in beat for beat in beats)


def test_a_damaged_source_ends_it(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(100))
    good = Check(tmp_path / "source", "source", 0, 50, "blake3", blake3(bytes(50)).hexdigest())
    make(tmp_path / "out", Counted(values()), checks=[good])
    bad = Check(tmp_path / "source", "source", 50, 100, "blake3", "0" * 64)
    with pytest.raises(ValueError, match=r"source is damaged between bytes 50 and 100"):
        make(tmp_path / "out", Counted(values()), checks=[good, bad])
    (tmp_path / "source").unlink()
    with pytest.raises(ValueError, match=r"source: source is missing"):
        make(tmp_path / "out", Counted(values()), checks=[good])


# The disk


def test_a_disk_that_fills_up_while_parts_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, pwrite = [], os.pwrite

    def full(descriptor: int, content, position: int) -> int:
        if len(written) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(position)
        return pwrite(descriptor, memoryview(content)[:1000], position)  # and never more than some bytes at a time

    source = Counted(values())
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(ValueError) as caught:
            make(tmp_path / "out", source)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'out'}: No space left on device. What is done is kept") and "goes on" in said
    again = Counted(values())
    assert is_whole(tmp_path / "out", make(tmp_path / "out", again))
    assert len(source.read) + len(again.read) == PARTS + 1  # the one that did not fit


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with disk(tmp_path / "small", "size=64k") as small:
        big = torch.zeros(1000, 100)
        part = transfer.rows("x", 0, "x", HeldTensor(big), 0, 1000)
        journal = Journal(small.path / "journal", "job")
        try:
            with pytest.raises(ValueError, match=r"small.*: No space left on device\. What is done is kept"):
                transfer.make(small.path, [part], journal, workers=1)
        finally:
            journal.close()


def test_a_disk_that_refuses_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(journal: Journal, lines: list[str]) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    folder = tmp_path / "out"
    folder.mkdir()
    journal = Journal(tmp_path / "journal", "job")
    monkeypatch.setattr(Journal, "_write", fail)
    with pytest.raises(ValueError, match=r"out: Input/output error\. What is done is kept"):
        transfer.make(folder, parts_of(Counted(values())), journal, workers=2)
    journal.close()


# The journal


def test_the_journal_keeps_what_was_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, "job")
    journal.add([(3, "a"), (4, "b")])
    journal.add([(5, "c")])
    journal.close()
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        again = Journal(path, "job")
        kept = max(0, sum(length >= len(b"".join(lines[: n + 1])) for n in range(len(lines))) - 1)
        assert again.done == dict([(3, "a"), (4, "b"), (5, "c")][:kept])
        again.add([(9, "new")])  # behind what holds, not behind the torn line
        again.close()
        third = Journal(path, "job")
        assert third.done == again.done and 9 in third.done
        third.close()


@pytest.mark.parametrize(
    "rest", [b"\0\0\0\0\n", b"5\n", b"null\n", b"[1]\n", b'[1, "a", 2]\n', b'[[1], "a"]\n', b"{}\n"]
)
def test_the_journal_ends_where_it_makes_no_sense(rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(json.dumps({"job": "job"}).encode() + b'\n[3, "a"]\n' + rest + b'[4, "b"]\n')
    journal = Journal(path, "job")
    assert journal.done == {3: "a"}
    journal.close()


@pytest.mark.parametrize("content", [b'{"job": "other"}\n[3, "a"]\n', b'[3, "a"]\n', b"\xff\n", b'{"job": "job"}', b""])
def test_the_journal_of_another_job_is_begun_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(content)
    journal = Journal(tmp_path / "journal", "job")
    assert journal.done == {}
    journal.close()
    assert (tmp_path / "journal").read_bytes() == b'{"job": "job"}\n'


def test_two_processes_do_not_write_the_same(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", "job")
    child = os.fork()
    if child == 0:
        try:
            Journal(tmp_path / "journal", "job")
        except ValueError as error:
            os._exit(7 if "another process is writing" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    journal.close()
    journal.close()
    Journal(tmp_path / "journal", "job").close()


def test_a_workplace_leaves_those_of_others_alone(tmp_path: Path) -> None:
    """Only what the same target's other conversions left is removed, and not while one of them works."""
    ids = [digit * 12 for digit in "abcd"]
    for name in ("model", "model-2", f"model-{'e' * 12}"):
        place = Workplace(tmp_path / name, ids[0])
        place.folder.joinpath("x").write_bytes(b"x")
        place.close()
    busy = Workplace(tmp_path / "model", ids[1])
    busy.folder.joinpath("x").write_bytes(b"x")
    assert not (tmp_path / f".tmp-model-{ids[0]}").exists()
    Workplace(tmp_path / "model", ids[2]).close()  # with nothing in it: it goes with its folder
    left = {f".tmp-model-{ids[1]}", f".tmp-model-2-{ids[0]}", f".tmp-model-{'e' * 12}-{ids[0]}"}
    assert {path.name for path in tmp_path.iterdir()} == left
    with pytest.raises(ValueError, match="another process is writing"):
        Workplace(tmp_path / "model", ids[1])
    busy.close()


# Memory


@pytest.mark.parametrize("gigabytes", [0.5, 0.6, 0.75, 1, 2, 4, 100])
@pytest.mark.parametrize("wanted", [None, 1, 4, 100])
def test_as_many_workers_as_memory_allows(gigabytes: float, wanted: int | None) -> None:
    memory = int(gigabytes * 1e9)
    workers = transfer.num_workers(memory, wanted)
    assert 1 <= workers <= (wanted or 2 * (os.cpu_count() or 1))
    assert transfer._PROCESS_BYTES + workers * transfer._WORKER_BYTES <= memory


def test_too_little_memory_is_refused() -> None:
    least = transfer._PROCESS_BYTES + transfer._WORKER_BYTES
    assert transfer.num_workers(least) == 1
    with pytest.raises(ValueError, match=r"max_memory is 100 MB, at least \d+ MB are needed: raise it"):
        transfer.num_workers(10**8)
    with pytest.raises(ValueError, match="are needed"):
        transfer.num_workers(least - 1)


def test_rows_that_fit_no_buffer_are_refused(tmp_path: Path) -> None:
    source = HeldTensor(torch.zeros(1, (5 << 20) // 4))
    journal = Journal(tmp_path / "journal", "job")
    with pytest.raises(ValueError, match=r"wide has rows of 5,242,880 bytes, at most"):
        transfer.make(tmp_path, [transfer.rows("x", 0, "wide", source, 0, 1)], journal, workers=1)
    journal.close()
    assert num_bytes(source) == 5 << 20
