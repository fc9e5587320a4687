"""The one error that a configuration can cause: its message is all that the user sees."""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """A configuration that cannot run. The message names key, value and remedy; no traceback is shown."""

    @classmethod
    def of(cls, problems: Iterable[str], most: int = 8) -> ConfigError:
        """One error of several problems: a line each, the first `most` of them."""
        lines = list(problems)
        assert lines
        more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
        return cls("\n".join(lines[:most] + more))
