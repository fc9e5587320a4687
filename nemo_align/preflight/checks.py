"""What a check finds, and the report of all of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from nemo_align.runtime import exit_codes

OK, NOTE, WARNING, FAILED = "ok", "note", "warning", "failed"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report. A check that failed has a remedy."""

    name: str  # versions, apex, driver, GPUs, plan, disk, files, links, configuration
    status: str  # ok | note (nothing to judge here) | warning | failed
    text: str
    remedy: str | None = None


def report(checks: Sequence[Check]) -> str:
    """The checks as lines, what is wrong last, and one line that sums up. A remedy of several in a row is said once,
    below them."""
    order = {OK: 0, NOTE: 1, WARNING: 2, FAILED: 3}
    lines = []
    listed = sorted(checks, key=lambda check: order[check.status])
    for check, following in zip_longest(listed, listed[1:]):
        head = f"{check.status:<9}{check.name:<15}"
        lines += [head + check.text.replace("\n", "\n" + " " * len(head))]
        if check.remedy is not None and (following is None or check.remedy != following.remedy):
            lines.append(f"{'':<9}remedy: {check.remedy}")
    failed, warned = (sum(check.status == status for check in checks) for status in (FAILED, WARNING))
    found = [f"{failed} failed"] if failed else []
    found += [f"{warned} warning{'s' if warned > 1 else ''}"] if warned else []
    lines.append(f"{len(checks)} checks: {', '.join(found) or 'nothing wrong'}")
    return "\n".join(lines)


def exit_code(checks: Iterable[Check]) -> int:
    """USER_ERROR if any failed: there is something to change before a job."""
    return exit_codes.USER_ERROR if any(check.status == FAILED for check in checks) else exit_codes.SUCCESS
