"""What is left of a run that has ended: processes, and ports that it listened on.

A process does not end at once when it is killed. Its leader is a zombie as soon as that thread has ended, while another
that waits for the disk (fsync) keeps the files of all of them open; and the last thread gives up its environment and
its table of files before it closes them, one by one. So owners of sockets are looked for thread by thread, and
processes that are known by their number are looked for until the last of their threads is gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

_SOCKET = re.compile(r"socket:\[(\d+)\]")
_EXITING = 0x4  # PF_EXITING, of the flags in /proc/<pid>/stat


@dataclass(frozen=True)
class Identity:
    """A process, and no later one that is given its number."""

    pid: int
    begun: int  # in ticks since the machine's start


@dataclass(frozen=True)
class Remnant:
    """A process that has not ended, and one of its threads by which that shows."""

    pid: int
    thread: int
    name: str
    state: str  # of the thread, as in /proc/<pid>/stat: D waits for a device
    dying: bool  # it ends as soon as the kernel lets it: nobody can do more

    def __str__(self) -> str:
        return f"{self.name}, pid {self.pid}, thread {self.thread} in state {self.state}{', dying' * self.dying}"


@dataclass(frozen=True)
class _Stat:
    """Of /proc/<pid>/stat, or of a thread's."""

    name: str
    state: str
    flags: int
    begun: int


def listening() -> set[int]:
    """Inodes of all TCP sockets of this machine that listen. Ports would not do: they soon belong to somebody else."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError):
            fields = (line.split() for line in Path(table).read_text().splitlines()[1:])
            found |= {int(field[9]) for field in fields if field[3] == "0A"}  # TCP_LISTEN
    return found


def held_by(processes: Iterable[Identity]) -> set[int]:
    """Inodes of all sockets of some processes."""
    return {inode for process in processes for inode in _sockets(Path(f"/proc/{process.pid}"))}


def identities(pids: Iterable[int]) -> set[Identity]:
    """Of those that exist."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            found.add(Identity(pid, _stat(Path(f"/proc/{pid}")).begun))
    return found


def unfinished(processes: Iterable[Identity]) -> list[Remnant]:
    """Those of which a thread has not ended yet."""
    found = []
    for process in processes:
        folder = Path(f"/proc/{process.pid}")
        with contextlib.suppress(OSError):
            if _stat(folder).begun == process.begun:
                found += _remnant(folder, lambda task: _stat(task).state not in "ZX")
    return found


def owners(inodes: set[int]) -> list[Remnant]:
    """Every process of which a thread holds one of these sockets."""
    folders = Path("/proc").glob("[0-9]*") if inodes else ()
    return [remnant for folder in folders for remnant in _remnant(folder, lambda task: bool(inodes & _sockets(task)))]


def _remnant(folder: Path, shows: Callable[[Path], bool]) -> list[Remnant]:
    """The process as its first thread shows it; nothing where none does, or where it ends meanwhile."""
    with contextlib.suppress(OSError):
        for task in (folder / "task").iterdir():
            with contextlib.suppress(OSError):
                if shows(task):
                    stat = _stat(task)
                    return [Remnant(int(folder.name), int(task.name), stat.name, stat.state, _dying(folder))]
    return []


def _dying(folder: Path) -> bool:
    killed = 1 << (signal.SIGKILL - 1)
    leader = _stat(folder)
    if leader.state in "ZX" or leader.flags & _EXITING:
        return True
    for task in (folder / "task").iterdir():
        pending = re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)", (task / "status").read_text(), re.MULTILINE)
        if any(int(mask, 16) & killed for mask in pending):
            return True
    return False


def _sockets(task: Path) -> set[int]:
    found = set()
    with contextlib.suppress(OSError):
        for entry in (task / "fd").iterdir():
            with contextlib.suppress(OSError):
                if match := _SOCKET.fullmatch(os.readlink(entry)):
                    found.add(int(match[1]))
    return found


def _stat(task: Path) -> _Stat:
    before, _, after = (task / "stat").read_text().rpartition(")")
    fields = after.split()  # the third of proc(5) is the first here
    return _Stat(before.partition("(")[2], fields[0], int(fields[6]), int(fields[19]))
