"""The walk that every kind of row shares: sources, formats, places in messages, counts, progress."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from nemo_align.config.data import RowsConfig
from nemo_align.data.bad_rows import BadRows
from nemo_align.data.chat import Dialogue, Pair, Rated, RowError
from nemo_align.data.row_formats.table import Kind, RowFormat, find_format
from nemo_align.data.rows import Row, read_rows
from nemo_align.runtime import watchdog
from nemo_align.runtime.signals import leave_if_asked

log = logging.getLogger("nemo_align")

PROGRESS_SECONDS = 15.0


def converted_rows(
    sources: Mapping[str, RowsConfig],
    kinds: tuple[Kind, ...],
    counts: Counter[str],
    bad: BadRows,
    *,
    seed: int,
    attributes: Sequence[str] = (),
) -> Iterator[tuple[tuple[int, int], list[Dialogue | Pair | Rated], Callable[[RowError], None]]]:
    """((source number, row number), what the row says, what to call if it is refused after all), in order.

    Counts `rows`. The first good row of a source decides its format. A bad row goes to `bad`: a ValueError that names
    file, line, field and remedy, or it is set aside.
    """
    started = reported = time.monotonic()
    for source, (name, config) in enumerate(sources.items()):
        form: RowFormat | None = None
        rows_before = counts["rows"]
        for row in read_rows(config, seed=seed, with_unreadable=True):
            counts["rows"] += 1
            watchdog.beat(f"reading rows of {name}")
            leave_if_asked()
            try:
                if row.error is not None:
                    raise row.error
                if form is None:
                    form = find_format(row.record, kinds, name=config.format, attributes=list(attributes))
                    log.info("%s: %s, format %s", name, config.path, form.name)
                found = _convert(form, row, attributes)
            except RowError as error:
                bad.reject(name, config, row, error)
            else:
                yield (source, row.number), found, partial(bad.reject, name, config, row)
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                log.info(
                    "%s: %s rows read, %.0f rows/s", name, f"{counts['rows']:,}", counts["rows"] / (reported - started)
                )
        if counts["rows"] == rows_before:
            raise ValueError(f"{config.path}: no rows; check the path of {name}")
        bad.check_source(name, config, counts["rows"] - rows_before)


def _convert(form: RowFormat, row: Row, attributes: Sequence[str]) -> list[Any]:
    absent = [column for column in form.columns if column not in row.record]
    if absent:
        raise RowError(
            absent[0],
            f"missing, while earlier rows of the file are {form.name}",
            "put rows of different formats in different files",
        )
    found = form.convert(row.record, list(attributes)) if form.kind == "rated" else form.convert(row.record)
    return found if isinstance(found, list) else [found]
