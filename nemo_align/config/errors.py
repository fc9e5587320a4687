"""The one error that a configuration can cause: its message is all that the user sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType


class ConfigError(ValueError):
    """A configuration that cannot run. The message names key, value and remedy; no traceback is shown."""

    @classmethod
    def of(cls, problems: Iterable[str], most: int = 8) -> ConfigError:
        """One error of several problems: a line each, the first `most` of them, each said once."""
        lines = list(dict.fromkeys(problems))
        assert lines
        more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
        return cls("\n".join(lines[:most] + more))

    @classmethod
    def of_stages(cls, problems: Mapping[str, Sequence[str]], number: int, most: int = 8) -> ConfigError:
        """One error of the problems of a recipe's stages: each said once, with the stages that have it; without their
        names where all `number` of them do."""
        having: dict[str, list[str]] = {}
        for stage, texts in problems.items():
            for text in dict.fromkeys(texts):
                having.setdefault(text, []).append(stage)
        return cls.of(
            (
                text if 1 < number == len(stages) else f"stage{'s' * (len(stages) > 1)} {', '.join(stages)}: {text}"
                for text, stages in having.items()
            ),
            most,
        )


def raised_by_this_package(error: ValueError) -> bool:
    """Whether the message was written for the user: a library's ValueError is a defect, whose traceback is needed."""
    trace: TracebackType | None = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    # `python -m nemo_align.cli` runs that module under the name __main__.
    return trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in ("nemo_align", "__main__")
