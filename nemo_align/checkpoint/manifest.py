"""manifest.json: what a checkpoint is, and size and checksum of each of its files.

The manifest is the last file written into a checkpoint before it is published, so a folder with a manifest whose
sizes hold is whole. It is plain JSON: pipelines, model cards and `inspect` read it without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

MANIFEST_FILE = "manifest.json"
FORMAT = 1
REQUIRED_KEYS = (
    "format",
    "verb",
    "step",
    "final",
    "model",
    "reward",
    "layout",
    "optimizer_sharding",
    "dtype",
    "tokenizer",
    "state",
    "files",
    "megatron_core",
    "torch",
)
_READ_BYTES = 8 << 20


def file_checksum(path: Path) -> str:
    """Hex blake2b (256 bit) of a file: faster than SHA-256 and in the standard library."""
    digest = hashlib.blake2b(digest_size=32)
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def list_files(folder: Path) -> list[str]:
    """Names of all files below `folder` except the manifest: relative, with '/', sorted."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in files if (name := path.relative_to(folder).as_posix()) != MANIFEST_FILE)


def describe_files(folder: Path, names: list[str]) -> dict[str, dict]:
    """The manifest's entry {"bytes", "blake2b"} of each named file."""
    return {name: {"bytes": (folder / name).stat().st_size, "blake2b": file_checksum(folder / name)} for name in names}


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write `folder`/manifest.json durably. `manifest` has all of REQUIRED_KEYS but "format"."""
    manifest = {"format": FORMAT, **manifest}
    missing = [key for key in REQUIRED_KEYS if key not in manifest]
    assert not missing, f"manifest lacks {missing}"
    text = json.dumps(manifest, indent=1, allow_nan=False)  # NaN is not JSON: other readers would fail
    write_durably(folder / MANIFEST_FILE, text.encode())


def read_manifest(folder: Path) -> dict:
    """The manifest of the checkpoint in `folder`, its keys and file names checked.

    Raises:
        ValueError: no manifest, broken JSON, a key missing, another format version, a file name leaving the folder.
    """
    path = Path(folder) / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {MANIFEST_FILE}: not a checkpoint of nemo_align, or its save was cut off"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): the checkpoint is damaged, use an older one") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} holds {type(manifest).__name__}, not an object: the checkpoint is damaged")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {manifest.get('format')!r}, this version reads {FORMAT}")
    if missing := [key for key in REQUIRED_KEYS if key not in manifest]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: the checkpoint is damaged, use an older one")
    if not isinstance(manifest["files"], dict):
        raise ValueError(f"{path}: files is no table: the checkpoint is damaged, use an older one")
    tokenizer = manifest["tokenizer"]
    for name in [*manifest["files"], *([] if tokenizer is None else [tokenizer])]:
        if not isinstance(name, str) or leaves_folder(name):
            raise ValueError(f"{path}: file name {name!r} leaves the checkpoint's folder")
    for name, entry in manifest["files"].items():
        if not (
            isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("blake2b"), str)
        ):
            raise ValueError(f"{path}: files[{name!r}] must have bytes and blake2b")
    return manifest


def leaves_folder(name: str) -> bool:
    """Whether a relative file name with '/' points outside of the folder that it is relative to."""
    return name.startswith("/") or ".." in name.split("/")


def check_sizes(folder: Path, manifest: dict) -> list[str]:
    """Problems found from file sizes alone (cheap); empty when all files are there at their length."""
    problems = []
    for name, entry in manifest["files"].items():
        try:
            found = (folder / name).stat().st_size
        except FileNotFoundError:
            problems.append(f"{name} is missing")
            continue
        if found != entry["bytes"]:
            problems.append(f"{name} has {found} bytes, {entry['bytes']} expected")
    return problems


def check_checksums(folder: Path, manifest: dict, names: list[str]) -> list[str]:
    """Problems among the named files found by reading them (about a second per GB)."""
    problems = []
    for name in names:
        try:
            found = file_checksum(folder / name)
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
            continue
        if found != manifest["files"][name]["blake2b"]:
            problems.append(f"{name} is damaged: its checksum differs from the manifest's")
    return problems


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and force it to disk."""
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def flush_file(path: Path) -> None:
    """Force a written file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
