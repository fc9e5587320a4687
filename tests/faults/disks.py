"""Small disks that tests fill and make read-only. Mounting needs root: other users skip such tests, and hear so."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.report import LEDGER


class Disk:
    """A mounted tmpfs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, leave: int = 0) -> None:
        """Write a file that leaves `leave` bytes free, to the page."""
        with open(self._ballast, "ab") as stream, contextlib.suppress(OSError):
            while (size := shutil.disk_usage(self.path).free - leave) > 0:
                stream.write(b"\0" * min(size, 1 << 16))
                stream.flush()

    def make_room(self) -> None:
        """Delete that file."""
        self._ballast.unlink()

    def remount(self, options: str) -> None:
        """Change the options of the mount, such as ro or rw."""
        _run("mount", "-o", f"remount,{options}", str(self.path))


@contextlib.contextmanager
def disk(path: Path, options: str) -> Iterator[Disk]:
    """Mount a tmpfs with `options` at the new folder `path`, or skip the test."""
    path.mkdir(parents=True)
    with _mounted(path, "-t", "tmpfs", "-o", options, "tmpfs"):
        yield Disk(path)


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Make an existing folder read-only while files beside it stay open for writing."""
    with _mounted(path, "--bind", str(path)):
        _run("mount", "-o", "remount,bind,ro", str(path))
        yield


@contextlib.contextmanager
def _mounted(path: Path, *arguments: str) -> Iterator[None]:
    done = subprocess.run(["mount", *arguments, str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = f"mounting a disk of one's own is not permitted here: {done.stderr.strip()}"
        LEDGER.mounts["not permitted"] += 1
        if os.geteuid() == 0:  # whoever tests as root means to have these proofs: they must not vanish unnoticed
            pytest.fail(reason)
        pytest.skip(reason)
    LEDGER.mounts["mounted"] += 1
    try:
        yield
    finally:
        _run("umount", "--lazy", str(path))


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
