"""Values of a config.json that somebody else wrote, each checked for its kind. Imports neither torch nor transformers.

JSON has true where Python has 1 and NaN where nothing should be; unchecked, either comes back later as a traceback.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

_MOST_SHOWN = 60  # characters of a value in an error


class HFValues:
    """The object in a config.json. Methods raise ValueError, naming file and key, on a value of another kind.

    A key that is missing or null gives None.
    """

    def __init__(self, values: dict[str, Any], path: Path, prefix: str = "") -> None:
        """`prefix`: where the object lies in the file, for errors."""
        self.values, self.path, self._prefix = values, path, prefix

    def size(self, key: str, *, most: int, unit: str) -> int | None:
        """A whole number from 1 to `most`."""
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) is not int or value < 1:
            raise self.wrong(key, "a whole number, 1 or more,")
        if value > most:
            raise ValueError(
                f"{self.path}: {self._prefix}{key} means {shown(f'{value:,}')} {unit}, at most {most:,} make sense"
            )
        return value

    def positive(self, key: str, *, most: float) -> float | None:
        """A number above 0, at most `most`."""
        value = self.number(key)
        if value is not None and not 0 < value <= most:
            raise self.wrong(key, f"a number above 0, at most {most:g},")
        return value

    def number(self, key: str) -> float | None:
        """A number that is finite as a float."""
        value = self.values.get(key)
        if value is None:
            return None
        # Python's whole numbers have no bound, and isfinite refuses those that no float holds.
        if type(value) not in (int, float) or not abs(value) < 1e300 or not math.isfinite(value):
            raise self.wrong(key, "a finite number")
        return value

    def text(self, key: str) -> str | None:
        """A string."""
        value = self.values.get(key)
        # Half of a surrogate pair is JSON, and no file can be written with it.
        if value is not None and (not isinstance(value, str) or any("\ud800" <= char <= "\udfff" for char in value)):
            raise self.wrong(key, "a string")
        return value

    def flag(self, key: str) -> bool | None:
        """true or false."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty where there is none."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.wrong(key, "a list of strings")
        return value

    def table(self, key: str) -> HFValues:
        """An object; empty where there is none."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return HFValues(value or {}, self.path, f"{self._prefix}{key}.")

    def wrong(self, key: str, expected: str) -> ValueError:
        """The error for a value that is not as `expected`."""
        return ValueError(
            f"{self.path}: {self._prefix}{key} is {shown(repr(self.values.get(key)))}, but {expected} is expected: "
            "correct it"
        )


def shown(text: str) -> str:
    """A text that may be long, cut for an error."""
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."
