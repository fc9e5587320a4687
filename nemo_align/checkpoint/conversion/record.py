"""conversion.json: what a Hugging Face folder was made from, and the checksums of its files."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_align.checkpoint import checksums
from nemo_align.checkpoint.manifest import leaves_folder

RECORD_FILE = "conversion.json"
_KEYS = ("format", "job", "source", "files")
FORMAT = 1


def read_record(folder: Path) -> dict | None:
    """The record in `folder`; None if there is none.

    Raises:
        ValueError: it is not what we write.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to go without checksums") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT or any(key not in record for key in _KEYS):
        raise ValueError(f"{path} is none of ours (format {FORMAT}): remove it to go without checksums")
    files = record["files"]
    if not isinstance(files, dict) or not all(map(checksums.is_entry, files.values())):
        raise ValueError(f"{path} is damaged: its files have no checksums. Remove it to go without")
    for name in files:
        if leaves_folder(name) or name == RECORD_FILE:
            raise ValueError(f"{path}: file name {name!r} leaves the folder")
    return record


def record_of(job: str, source: dict, files: dict[str, dict]) -> bytes:
    """The text of a record."""
    values = {"format": FORMAT, "job": job, "source": source, "files": dict(sorted(files.items()))}
    return (json.dumps(values, indent=1) + "\n").encode()
