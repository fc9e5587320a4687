"""The folder in which a target grows, beside the place where it will appear, whole or not at all.

Its name ends in the job's identity, so the same command finds it again after a kill and another one does not.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from nemo_align.checkpoint.manifest import flush_file
from nemo_align.checkpoint.streaming.transfer import Journal

JOURNAL = "journal.jsonl"
_ID_CHARACTERS = 12

logger = logging.getLogger("nemo_align")


class Workplace:
    """A target that is being written. `folder` holds it until `publish`."""

    def __init__(self, target: Path, job: str) -> None:
        """Begin, or go on with what the same job left.

        Raises:
            ValueError: the folder cannot be made, or another process works in it.
        """
        self.target = target
        prefix = f".tmp-{target.name}-"
        self._room = _room_of(target, job)
        self.folder = self._room / "target"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.journal = Journal(self._room / JOURNAL, job)
        except OSError as error:
            raise ValueError(f"target={target} cannot be written: {error.filename}: {error.strerror}") from None
        # Not of "model-2" when this is "model": the name ends in an identity and nothing else.
        ours = re.compile(re.escape(prefix) + rf"[0-9a-f]{{{_ID_CHARACTERS}}}")
        for other in target.parent.iterdir():
            if ours.fullmatch(other.name) and other != self._room and _is_idle(other):
                logger.info("removing %s, left by another conversion that did not finish", other)
                shutil.rmtree(other, ignore_errors=True)

    def needed_bytes(self, total: int) -> int:
        """Disk space that `total` bytes of files still take."""
        there = sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())
        return max(0, total - there)

    def publish(self, *, overwrite: bool) -> None:
        """Let the target appear, durably.

        Raises:
            ValueError: something else appeared in its place.
        """
        for path in sorted(self.folder.rglob("*")):
            flush_file(path)
        flush_file(self.folder)
        if self.target.exists():
            if not overwrite and any(self.target.iterdir()):
                raise ValueError(f"{self.target} appeared meanwhile: remove it and start the same command again")
            # Aside first: deleted in place, a kill would leave half of it under its name.
            replaced = self._room / "replaced"
            shutil.rmtree(replaced, ignore_errors=True)  # of this job, killed while it left
            os.rename(self.target, replaced)
        os.rename(self.folder, self.target)
        flush_file(self.target.parent)
        self.close()
        shutil.rmtree(self._room, ignore_errors=True)

    def tell_what_stays(self) -> None:
        """Say where the parts are that are done, if any are."""
        if self.journal.done:
            logger.warning(
                "%d parts are done and stay in %s: the same command goes on there, unless the source changes. Remove "
                "it if you do not want that",
                len(self.journal.done),
                self._room,
            )

    def close(self) -> None:
        """Leave; what is done stays, and where nothing is, nothing does."""
        if not self.journal.done and self.folder.is_dir() and not any(self.folder.iterdir()):
            shutil.rmtree(self._room, ignore_errors=True)
        self.journal.close()


def clear(target: Path, job: str) -> None:
    """Remove what a job left that was killed when its target had appeared."""
    room = _room_of(target, job)
    if room.is_dir() and _is_idle(room):
        shutil.rmtree(room, ignore_errors=True)


def _room_of(target: Path, job: str) -> Path:
    return target.with_name(f".tmp-{target.name}-{job[:_ID_CHARACTERS]}")


def _is_idle(room: Path) -> bool:
    """Whether no other process works there."""
    try:
        Journal(room / JOURNAL, "").close()
    except (ValueError, OSError):
        return False
    return True
