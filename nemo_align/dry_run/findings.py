"""What a dry run finds: problems that the run would be refused for, what is not on this machine, and warnings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from nemo_align.config.errors import raised_by_this_package


@dataclass
class Findings:
    """Collected over all parts of a dry run, so that all of them are said at once."""

    problems: list[str] = field(default_factory=list)
    absent: dict[str, list[str]] = field(default_factory=dict)  # path of a file that is not here -> keys that name it
    warnings: list[str] = field(default_factory=list)

    def is_absent(self, key: str, path: str) -> None:
        """The run needs `path`, which `key` names, and this machine does not have it."""
        self.absent.setdefault(path, []).append(key)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Inside, a mistake of the user's ends only this part and becomes a problem."""
        try:
            yield
        except ValueError as error:
            if not raised_by_this_package(error):
                raise
            self.problems += str(error).splitlines()


@dataclass(frozen=True)
class Section:
    """A title and its lines."""

    title: str
    lines: list[str]

    def __str__(self) -> str:
        return "\n".join([self.title, *(f"  {line}" for line in self.lines)])


def number_of_bytes(count: float) -> str:
    """`24.9 GB`, decimal as disks and memory are sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count / size < 100 else f"{count / size:.0f} {unit}"
    return f"{count / 1e3:.3g} kB"


def number_of_tokens(count: float) -> str:
    """`7.6T`, `94B`, `800M`, `1,234`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:,.0f}"
