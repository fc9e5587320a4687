"""The largest errors that the invariance tests of a session measured, for its terminal summary."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Worst:
    """Largest error of each kind and the case that had it."""

    cases: int = 0
    errors: dict[str, tuple[float, str]] = field(default_factory=dict)  # kind -> (error, test)


_measured: dict[str, Worst] = {}


def record(group: str, case: str, errors: dict[str, float]) -> None:
    """Note the errors of one case of a group (a number format, say)."""
    worst = _measured.setdefault(group, Worst())
    worst.cases += 1
    for kind, error in errors.items():
        worst.errors[kind] = max(worst.errors.get(kind, (0.0, case)), (error, case))


def lines() -> list[str]:
    """What the summary prints; empty if no invariance test ran."""
    return [
        f"{group}: {worst.cases} cases; largest "
        + ", ".join(f"{kind} {error:.1e} ({case})" for kind, (error, case) in worst.errors.items())
        for group, worst in _measured.items()
    ]
