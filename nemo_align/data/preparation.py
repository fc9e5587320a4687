"""The walk that every kind of row shares: sources, formats, places in messages, counts, progress."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemo_align.config.data import RowsConfig
from nemo_align.data.chat import Dialogue, Pair, Rated, RowError
from nemo_align.data.row_formats.table import Kind, RowFormat, find_format
from nemo_align.data.rows import Row, read_rows

log = logging.getLogger("nemo_align")

PROGRESS_SECONDS = 15.0


def converted_rows(
    sources: Mapping[str, RowsConfig],
    kinds: tuple[Kind, ...],
    counts: Counter[str],
    *,
    seed: int,
    attributes: Sequence[str] = (),
) -> Iterator[tuple[int, Row, list[Dialogue | Pair | Rated]]]:
    """(source number, row, what the row says) of all sources in order. Counts `rows`.

    The first row of a source decides its format. A bad row is a ValueError that names file, line, field and remedy.
    """
    started = reported = time.monotonic()
    for source, (name, config) in enumerate(sources.items()):
        form: RowFormat | None = None
        for row in read_rows(config, seed=seed):
            counts["rows"] += 1
            if form is None:
                form = _format_of(row, config, kinds, attributes)
                log.info("%s: %s, format %s", name, config.path, form.name)
            yield source, row, _convert(form, row, attributes)
            if time.monotonic() - reported > PROGRESS_SECONDS:
                reported = time.monotonic()
                log.info(
                    "%s: %s rows read, %.0f rows/s", name, f"{counts['rows']:,}", counts["rows"] / (reported - started)
                )
        if form is None:
            raise ValueError(f"{config.path}: no rows; check the path of {name}")


def _format_of(row: Row, config: RowsConfig, kinds: tuple[Kind, ...], attributes: Sequence[str]) -> RowFormat:
    try:
        return find_format(row.record, kinds, name=config.format, attributes=list(attributes))
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from error


def _convert(form: RowFormat, row: Row, attributes: Sequence[str]) -> list[Any]:
    absent = [column for column in form.columns if column not in row.record]
    if absent:
        raise ValueError(
            f"{row.where}: {absent[0]}: missing, while earlier rows of the file are {form.name}; "
            "put rows of different formats in different files"
        )
    try:
        found = form.convert(row.record, list(attributes)) if form.kind == "rated" else form.convert(row.record)
    except RowError as error:
        raise ValueError(f"{row.where}: {error}") from error
    return found if isinstance(found, list) else [found]
