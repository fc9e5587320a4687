"""manifest.json: what a checkpoint is, and size and checksum of each of its files.

The manifest is the last file written into a checkpoint before it is published, so a folder with a manifest whose
sizes hold is whole. It is plain JSON: pipelines, model cards and `inspect` read it without torch. It holds a checksum
of itself too: a flipped digit in the number of consumed examples would replay or skip data in silence.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from nemo_align.checkpoint import checksums

MANIFEST_FILE = "manifest.json"
FORMAT = 2
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
_CHECKSUM = "checksum"


def list_files(folder: Path) -> list[str]:
    """Names of all files below `folder` except the manifest: relative, with '/', sorted."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in files if (name := path.relative_to(folder).as_posix()) != MANIFEST_FILE)


def describe_files(folder: Path, names: list[str]) -> dict[str, dict]:
    """The manifest's entry of each named file, as `checksums` describes it."""
    return {name: checksums.entry_of_file(folder / name) for name in names}


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write `folder`/manifest.json durably. `manifest` has all of REQUIRED_KEYS but "format"."""
    manifest = {"format": FORMAT, **manifest}
    missing = [key for key in REQUIRED_KEYS if key not in manifest]
    assert not missing, f"manifest lacks {missing}"
    write_durably(folder / MANIFEST_FILE, json.dumps(signed(manifest), indent=1, allow_nan=False).encode())


def signed(manifest: dict) -> dict:
    """A manifest with the checksum of its own content."""
    content = {key: value for key, value in manifest.items() if key != _CHECKSUM}
    # NaN is not JSON: other readers would fail.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**content, _CHECKSUM: checksums.digest_of([text.encode()])}


def read_manifest(folder: Path) -> dict:
    """The manifest of the checkpoint in `folder`, its keys and file names checked.

    Raises:
        ValueError: no manifest, broken JSON, a key missing, another format version, a file name leaving the folder, or
            content that is not what was written.
        checksums.Unreadable: it is there and the disk does not give it.
    """
    path = Path(folder) / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder} has no {MANIFEST_FILE}: not a checkpoint of nemo_align, or its save was cut off"
        ) from None
    except OSError as error:
        raise checksums.unreadable(path, error) from None
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
        if not checksums.is_entry(entry):
            raise ValueError(f"{path}: files[{name!r}] must have bytes and one of {', '.join(checksums.ALGORITHMS)}")
    if manifest.get(_CHECKSUM) != signed(manifest)[_CHECKSUM]:
        raise ValueError(f"{path} is damaged or was edited: its own checksum differs, use an older checkpoint")
    return manifest


def leaves_folder(name: str) -> bool:
    """Whether a relative file name with '/' points outside of the folder that it is relative to."""
    return name.startswith("/") or ".." in name.split("/")


def check_sizes(folder: Path, manifest: dict) -> list[str]:
    """Problems found from file sizes alone (cheap); empty when all files are there at their length.

    Raises:
        checksums.Unreadable: the disk does not answer.
    """
    problems = []
    for name, entry in manifest["files"].items():
        try:
            found = (folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            problems.append(f"{name} is missing")
            continue
        except OSError as error:
            raise checksums.unreadable(folder / name, error) from None
        if found != entry["bytes"]:
            problems.append(f"{name} has {found} bytes, {entry['bytes']} expected")
    return problems


def check_checksums(folder: Path, manifest: dict, names: list[str]) -> list[str]:
    """Problems among the named files found by reading them.

    Raises:
        checksums.Unreadable: the disk does not give a file's content.
    """
    found = (checksums.problem_of(folder / name, name, manifest["files"][name]) for name in names)
    return [problem for problem in found if problem is not None]


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
