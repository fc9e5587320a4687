"""Carrying out a conversion: refuse before starting, go on after a kill, verify, let the target appear whole."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_align.checkpoint import checksums
from nemo_align.checkpoint import manifest as manifests
from nemo_align.checkpoint.checksums import BLAKE3
from nemo_align.checkpoint.conversion import workplace
from nemo_align.checkpoint.conversion.model import Model
from nemo_align.checkpoint.conversion.record import RECORD_FILE, read_record
from nemo_align.checkpoint.conversion.target import Target
from nemo_align.checkpoint.conversion.workplace import Workplace
from nemo_align.checkpoint.manifest import MANIFEST_FILE
from nemo_align.checkpoint.streaming import transfer
from nemo_align.checkpoint.streaming.tensors import pieces_in
from nemo_align.checkpoint.streaming.transfer import Check, Progress

_MAPPING = 2  # raised when the same source gives other files: a half-written target of before is then begun anew
_SPARE_BYTES = 4 << 20  # for small files

logger = logging.getLogger("nemo_align")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a conversion runs; nothing here changes what is written but `algorithm`."""

    workers: int
    algorithm: str = BLAKE3
    overwrite: bool = False
    progress: Progress | None = None
    beat: Callable[[str], None] = lambda _: None
    check: Callable[[Path], None] | None = None  # raises if the folder is not what it should be: then it never appears


def job_of(models: list[Model], target: Target, algorithm: str) -> str:
    """The identity of a conversion: of its sources and of everything that changes its result."""
    described = {
        "mapping": _MAPPING,
        "part_bytes": transfer.PART_BYTES,
        "sources": [[model.kind, model.identity] for model in models],
        "options": target.options,
        "algorithm": algorithm,
    }
    return checksums.digest_of([json.dumps(described, sort_keys=True).encode()])


def carry_out(models: list[Model], target: Target, path: Path, settings: Settings) -> bool:
    """Write `target` to the folder `path`. False if the same conversion had already done so: it is verified only.

    Raises:
        ValueError: `path` exists and is something else, too little space on its disk, a disk that cannot be written, a
            damaged source.
    """
    path = Path(path)
    if path.is_symlink() or path.is_mount():
        raise ValueError(
            f"target={path} is a link or a mount point, which a finished folder cannot replace: name one in it"
        )
    if any(model.path.is_dir() and path.resolve().is_relative_to(model.path.resolve()) for model in models):
        raise ValueError(f"target={path} lies inside the source: name a folder elsewhere")
    job = job_of(models, target, settings.algorithm)
    if is_done(path, job) and not settings.overwrite:
        workplace.clear(path, job)
        verify_files(path, settings)
        if settings.check is not None:
            settings.check(path)
        return False
    if path.exists() and not settings.overwrite and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already: remove it or name another target")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"target={path} cannot be written: {error.filename}: {error.strerror}") from None
    place = Workplace(path, job)
    try:
        _check_space(place.needed_bytes(target.num_bytes) + _SPARE_BYTES, path.parent)
        if place.journal.done:
            logger.info("going on: %d of %d parts are done", len(place.journal.done), len(target.parts))
        target.write_small(place.folder)
        gigabytes = target.num_bytes / 1e9
        logger.info("%s: %d tensors, %.2f GB, %d workers", path, len(target.planned), gigabytes, settings.workers)
        entries = transfer.make(
            place.folder,
            target.parts,
            place.journal,
            workers=settings.workers,
            algorithm=settings.algorithm,
            checks=[check for model in models for check in checks_of(model)],
            progress=settings.progress,
            beat=settings.beat,
        )
        for name in manifests.list_files(place.folder):
            if name not in entries and name != RECORD_FILE:
                entries[name] = checksums.entry_of_file(place.folder / name, settings.algorithm)
        for model in models:
            _refuse_changed(model)
        target.seal(place.folder, job, entries)
        if settings.check is not None:
            settings.check(place.folder)
        place.publish(overwrite=settings.overwrite)
    except OSError as error:
        raise transfer.cannot_go_on(error, place.folder) from None
    except (KeyboardInterrupt, ValueError):
        place.tell_what_stays()
        raise
    finally:
        place.close()
    return True


def _refuse_changed(model: Model) -> None:
    """A source that was written to meanwhile would be half the old and half the new."""
    if model.identify is not None and model.identify() != model.identity:
        raise ValueError(f"{model.path} changed while it was read: start the same command again")


def is_done(path: Path, job: str) -> bool:
    """Whether `path` holds the result of this very conversion."""
    try:
        record = read_record(path)
        if record is None and (path / MANIFEST_FILE).is_file():
            record = manifests.read_manifest(path)
    except ValueError:
        return False
    return record is not None and record.get("job") == job


def verify_files(path: Path, settings: Settings) -> None:
    """Compare every file of a finished target with its checksums.

    Raises:
        ValueError: something differs.
    """
    record = read_record(path) or manifests.read_manifest(path)
    problems = []
    total = sum(entry["bytes"] for entry in record["files"].values())
    progress = settings.progress or Progress()
    progress.begin(total, 0)
    try:
        for name, entry in record["files"].items():
            if (problem := checksums.problem_of(path / name, name, entry)) is not None:
                problems.append(problem)
            progress.advance(entry["bytes"])
            settings.beat(f"verifying {path / name}")
    finally:
        progress.end()
    if problems:
        raise ValueError(f"{path} was converted before and is damaged now: {'; '.join(problems[:3])}. Remove it")


def checks_of(model: Model) -> list[Check]:
    """The stretches of a model's files that are read and whose checksums are known."""
    read: dict[Path, list[tuple[int, int]]] = {}
    for source in model.tensors.values():
        for piece, item in pieces_in(source):
            end = piece.start + piece.rows * piece.columns * item
            read.setdefault(Path(piece.path), []).append((piece.start, end))
    return sorted(_checks(model, read), key=lambda check: (str(check.path), check.first))


def _checks(model: Model, read: dict[Path, list[tuple[int, int]]]) -> Iterator[Check]:
    for name, entry in model.files.items():
        path = model.path / name
        stretches = sorted(read.get(path, []))
        for first, end, algorithm, digest in checksums.parts_of(entry) if stretches else ():
            if any(begin < end and stop > first for begin, stop in stretches):
                yield Check(path, name, first, end, algorithm, digest)


def _check_space(needed: int, folder: Path) -> None:
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed:  # some network file systems tell nothing: zero bytes in all
        raise ValueError(
            f"the target needs {needed:,} bytes ({needed / 1e9:.1f} GB), and {folder} has {usage.free:,} "
            f"({usage.free / 1e9:.1f} GB) free: make room there or name a target on a larger disk"
        )
