"""A key and its value as an override, whatever characters the value has."""

from __future__ import annotations

import re

_PLAIN_VALUE = re.compile(r"[\w./:@%+-]+")  # needs no quotes in Hydra's grammar


def assignment(key: str, value: str) -> str:
    """`key=value` as Hydra reads it, quoted where its grammar wants that."""
    if _PLAIN_VALUE.fullmatch(value):
        return f"{key}={value}"
    # Inside quotes a backslash is plain, unless it stands before a quote.
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'")
    return f"{key}='{escaped}'"
