"""What happens to a row that is wrong (`data.bad_rows`): it ends the run, or it is set aside with the reason."""

from __future__ import annotations

import json
from collections import Counter

from nemo_align.config.choices import CHOICES
from nemo_align.config.data import RowsConfig
from nemo_align.data.chat import RowError
from nemo_align.data.rows import Row
from nemo_align.data.tokenized_rows_writer import TokenizedRowsWriter

_MOST_REASONS = 20  # counted one by one in the report; the rest together


def check_bad_rows(policy: str) -> None:
    """The setting, by name."""
    if policy not in CHOICES["data.bad_rows"]:
        raise ValueError(f"data.bad_rows: unknown policy {policy!r}; known: {', '.join(CHOICES['data.bad_rows'])}")


class BadRows:
    """Counts and writes the rows of one data set that are rejected. Under `error` the first one is raised.

    A rejected row is a line of `writer.rejected_path`:
    {"source": name, "file", "line" (JSON Lines, else null), "row", "field", "message", "raw"}; `raw` is the line as it
    stands in the file, or the row as JSON text.
    """

    def __init__(self, policy: str, writer: TokenizedRowsWriter) -> None:
        check_bad_rows(policy)
        self._policy = policy
        self._writer = writer
        self._reasons: Counter[str] = Counter()
        self._of_source: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # per source

    def reject(self, name: str, source: RowsConfig, row: Row, error: RowError) -> None:
        """Set `row` of source `name` aside. Raises ValueError with file and line if that is not asked for."""
        message = f"{row.where}: {error}"
        if self._policy == "error":
            raise ValueError(message) from error
        self._first.setdefault(name, message)
        self._of_source[name] += 1
        known = error.reason in self._reasons or len(self._reasons) < _MOST_REASONS
        self._reasons[error.reason if known else "other reasons"] += 1
        self._writer.reject(
            {
                "source": name,
                "file": source.path,
                "line": row.line,
                "row": row.number,
                "field": error.field,
                "message": str(error),
                "raw": _raw(row),
            }
        )

    def check_source(self, name: str, source: RowsConfig, rows: int) -> None:
        """After the last of a source's `rows`: a file of which nothing is left is an error under either policy."""
        if rows == self._of_source[name]:
            raise ValueError(
                f"{source.path}: all {rows:,} rows of {name} are rejected (see {self._writer.rejected_path}); "
                f"the first: {self._first[name]}"
            )

    def counts(self) -> dict[str, int | dict[str, int]]:
        """`quarantined`, and `quarantined_by_reason`, for the report; nothing if no row is."""
        if not self._reasons:
            return {}
        return {"quarantined": self._reasons.total(), "quarantined_by_reason": dict(self._reasons.most_common())}


def _raw(row: Row) -> str:
    if row.text is not None:
        return row.text.decode("utf-8", "backslashreplace")
    try:
        return json.dumps(row.record, default=str)
    except (RecursionError, TypeError, ValueError):  # what json cannot spell: parquet has types and depths beyond it
        return repr(list(row.record))
