"""metrics.jsonl: one JSON object a line, the record of a run that every report, plot and comparison reads.

Standard JSON only: a number that is not finite is written as null and its key listed under "nonfinite", because NaN
is no JSON and a reader that stops at it would lose the steps that matter most. No torch: the pipeline reads it too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records to <run_dir>/metrics.jsonl; each line is on its way to the disk when `write` returns.

    A record has "kind" (train | validation | save | forward), "step" and, where several of a kind share a step, "name".
    These three occur once in a file: a record that is written again after a resume takes the place of the earlier one.
    """

    def __init__(self, run_dir: Path | str) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._earlier: set[tuple] = set()  # keys of the records that were here before this process
        self._stream = None

    def resume(self, step: int) -> None:
        """Forget records after `step` (those of steps that a resumed run trains again) and a torn last line.

        Raises ValueError if the file cannot be written, with path and cause; `write` too."""
        self._replace([record for record in read_metrics(self.path) if record.get("step", 0) <= step])

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. Values: finite or not finite numbers, strings, and nested lists and mappings of them."""
        record = finite(record)
        try:
            if self._earlier and _key(record) in self._earlier:
                self._replace([other for other in read_metrics(self.path) if _key(other) != _key(record)])
            if self._stream is None:
                _end_torn_line(self.path)
                self._stream = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115  # by lines: a crash loses no step
            self._stream.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            stream, self._stream = self._stream, None
            if stream is not None:
                with suppress(OSError):  # closing tries once more to write what did not fit
                    stream.close()
            raise _unwritable(self.path, error) from None

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _replace(self, records: list[dict]) -> None:
        self.close()
        write_atomically(self.path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
        self._earlier = {_key(record) for record in records}


def read_metrics(path: Path | str) -> list[dict]:
    """Records of a metrics.jsonl (or of the run directory that holds it), in the order written; [] without a file.

    A last line that is cut off (the run was killed while it wrote) is left out. Raises ValueError with file and line
    for any other line that is no JSON object.
    """
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):  # no line break after it
                break
            raise ValueError(f"{path}:{number}: {error}; delete that line, every other step is intact") from None
        records.append(record)
    return records


def finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of plain Python numbers; what is not finite becomes None and is named under "nonfinite"."""
    lost: list[str] = []

    def clean(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            return {str(name): clean(part, f"{key}.{name}" if key else str(name)) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [clean(part, f"{key}[{index}]") for index, part in enumerate(value)]
        if isinstance(value, bool) or not isinstance(value, Real):
            return value
        if isinstance(value, Integral):
            return int(value)
        if math.isfinite(value):
            return float(value)
        lost.append(key)
        return None

    cleaned = clean(record, "")
    return {**cleaned, "nonfinite": lost} if lost else cleaned


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, sees the old or the new one whole.

    Raises ValueError with path and cause if that cannot be done; then the old one stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{path} cannot be written: {error.strerror}. Mend that and start the same command again: it goes on from the "
        "last checkpoint"
    )


def _key(record: Mapping[str, Any]) -> tuple:
    return record.get("kind"), record.get("step"), record.get("name")


def _end_torn_line(path: Path) -> None:
    """Cut off a last line without its line break, so that the next record does not continue it."""
    if not path.exists():
        return
    with open(path, "r+b") as stream:
        data = stream.read()
        stream.truncate(data.rfind(b"\n") + 1)
