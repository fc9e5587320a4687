"""The checkpoints of a run directory: where they lie, which is whole, publishing, retention, and finding one by path.

A checkpoint is written into `<run_dir>/checkpoints/.tmp-*` and renamed to `step_<7 digits>` when all of it is on disk,
so a crash leaves either the whole checkpoint or a `.tmp-*` that the next save removes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nemo_align.checkpoint.checksums import Unreadable
from nemo_align.checkpoint.manifest import (
    MANIFEST_FILE,
    check_checksums,
    check_sizes,
    flush_file,
    read_manifest,
)

CHECKPOINTS = "checkpoints"
TEMPORARY = ".tmp-"
REPLACED = ".replaced"  # suffix of a whole checkpoint while a new one of the same step takes its place
_STEP = re.compile(r"step_(\d{7,})$")
_SAMPLE_BYTES, _SAMPLE_EVERY = 1 << 16, 1 << 26
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library

logger = logging.getLogger("nemo_align")


def _nobody_asks() -> None:
    """Who wants no word of progress."""


@dataclass(frozen=True)
class CheckpointReference:
    """Weights to start from, found by `resolve`."""

    kind: str  # megatron | hf
    path: Path
    manifest: dict | None  # of a Megatron checkpoint


def checkpoint_path(run_dir: Path | str, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return Path(run_dir) / CHECKPOINTS / f"step_{step:07d}"


def newest_complete(run_dir: Path | str, *, checksums: bool = True) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are skipped with a warning. None if there is none.

    `checksums` reads every file (about a second per GB); without it only presence and sizes are checked.
    """
    for path in candidates(run_dir):
        problems = find_problems(path, checksums=checksums)
        if not problems:
            return path
        warn_skipped(path, problems)
    return None


def candidates(run_dir: Path | str) -> list[Path]:
    """Published checkpoints, whole or not, newest first. One that was being replaced comes after its successor."""
    folder = Path(run_dir) / CHECKPOINTS
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        name = path.name.removesuffix(REPLACED)
        if (match := _STEP.match(name)) and path.is_dir():
            found.append((int(match[1]), path.name == name, path))
    return [path for *_, path in sorted(found, reverse=True)]


def find_problems(path: Path, *, checksums: bool) -> list[str]:
    """What is wrong with the checkpoint in `path`; empty when it is whole.

    Raises:
        Unreadable: the disk does not give its content, which says nothing about it.
    """
    try:
        manifest = read_manifest(path)
    except Unreadable:
        raise
    except ValueError as error:
        return [str(error)]
    return check_sizes(path, manifest) or (
        check_checksums(path, manifest, list(manifest["files"])) if checksums else []
    )


def warn_skipped(path: Path, problems: list[str]) -> None:
    """Say why a checkpoint is passed over for an older one."""
    logger.warning("checkpoint %s is damaged and skipped: %s", path, "; ".join(problems[:3]))


def begin(run_dir: Path | str, step: int, num_bytes: int = 0) -> Path:
    """A new temporary folder to write the checkpoint of `step` into; what crashed saves left is removed.

    Raises:
        ValueError: it cannot be made, or fewer than `num_bytes` are free on its disk.
    """
    folder = Path(run_dir) / CHECKPOINTS
    temporary = folder / f"{TEMPORARY}step_{step:07d}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(run_dir)
        _check_space(folder, num_bytes)
        temporary.mkdir()
    except OSError as error:
        raise ValueError(f"the checkpoint of step {step} cannot be written: {cause(error, folder)}") from None
    return temporary


def discard(temporary: Path) -> None:
    """Delete the folder of a save that failed, as far as the disk lets us."""
    shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(run_dir: Path | str) -> None:
    """Remove what saves that died left behind; put back a checkpoint whose replacement was not published.

    Raises OSError on a disk that cannot be written.
    """
    folder = Path(run_dir) / CHECKPOINTS
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(TEMPORARY):
            logger.info("removing %s, left by a save that did not finish", path)
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.endswith(REPLACED):
            if (original := path.with_name(path.name.removesuffix(REPLACED))).exists():
                _remove(path)
            else:
                os.rename(path, original)


def tidy(run_dir: Path | str) -> None:
    """`remove_leftovers` for a run that is about to go on there.

    Raises:
        ValueError: the disk cannot be written.
    """
    try:
        remove_leftovers(run_dir)
    except OSError as error:
        raise ValueError(f"run_dir={run_dir} cannot be written: {cause(error, Path(run_dir))}") from None


def cause(error: BaseException, folder: Path) -> str:
    """An error while writing into `folder`, in one line that names a path."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or folder}: {error.strerror}"
    first = next(iter(str(error).splitlines()), "")
    return f"{folder}: {type(error).__name__}: {first}"


def publish(temporary: Path, target: Path, *, moved: Callable[[], None] = _nobody_asks) -> Path:
    """Make the finished folder `temporary` the checkpoint `target`, atomically and durably.

    A checkpoint of that step that exists already (a damaged one, or a periodic save where the stage now ends) steps
    aside first, under a name by which `newest_complete` still finds it should we die between the two renames.

    `moved` is called after each file: a slow disk may take longer for all of them than a watch over the run allows.
    """
    for path in (*sorted(temporary.rglob("*")), temporary):
        flush_file(path)
        moved()
    aside = target.with_name(target.name + REPLACED)
    if target.exists():
        os.rename(target, aside)
    os.rename(temporary, target)
    flush_file(target.parent)
    moved()
    _delete(aside, moved)
    return target


def apply_retention(
    run_dir: Path | str, keep_last: int, *, published: Path | None = None, moved: Callable[[], None] = _nobody_asks
) -> list[Path]:
    """Delete old periodic checkpoints; returns the deleted.

    Kept: every final one, the newest `keep_last` whole periodic ones, and always the newest whole one. A damaged one
    is deleted only when a whole one that is newer stays.

    Args:
        published: the checkpoint that was just written, and so is known to be whole. A run resumes from the newest
            checkpoint whose checksums hold, so what is newer than `published` was found damaged then: sizes alone,
            which are compared here, might not tell. It counts for nothing and is deleted.
        moved: called after each file that is deleted.
    """
    kept, doomed, periodic = [], [], 0
    if published is not None:
        kept.append(published)
        periodic = 0 if read_manifest(published)["final"] else 1
    for path in candidates(run_dir):
        if path == published:
            continue
        if published is not None and _step_of(path) > _step_of(published):
            doomed.append(path)
            continue
        if find_problems(path, checksums=False):
            if kept:
                doomed.append(path)
            continue
        if not read_manifest(path)["final"]:
            periodic += 1
            if kept and periodic > keep_last:
                doomed.append(path)
                continue
        kept.append(path)
    for path in doomed:
        _remove(path, moved)
    return doomed


def resolve(path: Path | str) -> CheckpointReference:
    """Find the weights a user names: a run directory (its newest whole checkpoint), a checkpoint, or a HF folder.

    Raises:
        ValueError: nothing there, with the nearest paths that exist, or a folder that is none of the three.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; {_nearest(path)}")
    if not path.is_dir():
        raise ValueError(
            f"{path} is a file: archives (.nemo, .zip, .tar) and pickled weights are not opened. Name a run directory, "
            "a checkpoint, or a Hugging Face folder with .safetensors"
        )
    if (path / MANIFEST_FILE).exists() and (path / "metadata.json").exists():
        manifest = read_manifest(path)
        if problems := check_sizes(path, manifest):
            raise ValueError(f"checkpoint {path} is damaged: {'; '.join(problems[:3])}; use an older one")
        return CheckpointReference("megatron", path, manifest)
    run_dir = path.parent if path.name == CHECKPOINTS else path
    if (run_dir / CHECKPOINTS).is_dir():
        # Whoever loads it compares the checksums, with the reading shared over the ranks.
        newest = newest_complete(run_dir, checksums=False)
        if newest is None:
            raise ValueError(f"{run_dir} has no complete checkpoint: let the run write one, or name another")
        return CheckpointReference("megatron", newest, read_manifest(newest))
    if (path / "config.json").is_file():
        if not any(path.glob("*.safetensors")):
            others = ", ".join(sorted(p.name for p in path.glob("*.bin"))) or "no weights"
            raise ValueError(
                f"{path} is a Hugging Face folder without .safetensors ({others}): pickled weights are not read, "
                "save them again with safe_serialization=True"
            )
        return CheckpointReference("hf", path, None)
    if (path / "metadata.json").exists():
        raise ValueError(f"{path} is a Megatron checkpoint without {MANIFEST_FILE}: cut off, or not written by us")
    raise ValueError(
        f"{path} is not a run directory (no {CHECKPOINTS}/), a checkpoint (no {MANIFEST_FILE}) "
        f"or a Hugging Face folder (no config.json), nor a .nemo (no model_config.yaml); it holds {_listing(path)}"
    )


def manifest_hash(reference: CheckpointReference | Path | str) -> str:
    """A short fingerprint of a checkpoint's weights, for caches that depend on them.

    Megatron: of the manifest, which holds every file's checksum. Hugging Face: of config.json and, per safetensors
    file, name, size, header and 64 KiB of every 64 MiB (reading 680 GB for a cache key would cost more than it saves).
    """
    if not isinstance(reference, CheckpointReference):
        reference = resolve(reference)
    digest = hashlib.blake2b(digest_size=16)
    if reference.kind == "megatron":
        digest.update((reference.path / MANIFEST_FILE).read_bytes())
        return digest.hexdigest()
    digest.update((reference.path / "config.json").read_bytes())
    for path in sorted(reference.path.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size};".encode())
        with open(path, "rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            if header > _LONGEST_HEADER:
                raise ValueError(f"{path} is not a whole safetensors file: its header claims {header:,} bytes")
            digest.update(stream.read(header))
            for offset in range(8 + header, size, _SAMPLE_EVERY):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _step_of(path: Path) -> int:
    match = _STEP.match(path.name.removesuffix(REPLACED))
    assert match, path
    return int(match[1])


def _check_space(folder: Path, num_bytes: int) -> None:
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < num_bytes:  # some network file systems tell nothing: zero bytes in all
        raise ValueError(
            f"the next checkpoint needs {num_bytes:,} bytes ({num_bytes / 1e9:.2f} GB), and {folder} has "
            f"{usage.free:,} ({usage.free / 1e9:.2f} GB) free: make room there, lower checkpoint.keep_last, or move "
            "run_dir to a larger disk, and start the same command again"
        )


def _remove(path: Path, moved: Callable[[], None] = _nobody_asks) -> None:
    """Delete a checkpoint so that one half deleted is never taken for a whole one: renamed first."""
    doomed = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")
    os.rename(path, doomed)
    _delete(doomed, moved)


def _delete(folder: Path, moved: Callable[[], None]) -> None:
    """Delete a folder as far as the disk lets us."""
    with suppress(OSError):
        for path in sorted(folder.rglob("*")):
            if not path.is_dir():
                path.unlink()
                moved()
    shutil.rmtree(folder, ignore_errors=True)


def _nearest(path: Path) -> str:
    """What exists around a path that does not."""
    parent = next(candidate for candidate in path.absolute().parents if candidate.is_dir())
    return f"the nearest folder that exists is {parent}, which holds {_listing(parent)}"


def _listing(folder: Path, most: int = 8) -> str:
    names = sorted(child.name for child in folder.iterdir() if not child.name.startswith("."))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more if names else "nothing"
