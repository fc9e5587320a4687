"""What happens to an example that is longer than data.sequence_length: error, drop, or fewer turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nemo_align.config.choices import CHOICES
from nemo_align.data.chat import RowError
from nemo_align.data.chat_template import Turn

POLICIES = CHOICES["data.overlong"]


class Overlong(RowError):
    """An example is too long and the policy, or the absence of older turns, forbids to shorten it."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__("length", problem, remedy)


def check_policy(policy: str, sequence_length: int) -> None:
    """The two settings, by name."""
    if policy not in POLICIES:
        raise ValueError(f"data.overlong: unknown policy {policy!r}; known: {', '.join(POLICIES)}")
    if sequence_length < 1:
        raise ValueError(f"data.sequence_length: {sequence_length} tokens; must be at least 1")


def fit_turns(
    turns: Sequence[Turn], *, limit: int, keep: int, length: Callable[[Sequence[Turn]], int]
) -> Sequence[Turn] | None:
    """The turns without the oldest exchanges, as many as must go; None if that is not enough.

    The system turn (first) and the last `keep` turns stay. A user turn goes together with its answer, so what is left
    still begins with the user. `length` gives the tokens that the rendered turns take.
    """
    system, dialogue = turns[:1], turns[1:]
    for start in range(0, max(len(dialogue) - keep, 0) + 1, 2):
        shorter = [*system, *dialogue[start:]]
        if length(shorter) <= limit:
            return shorter
    return None


def too_long(length: int, limit: int, *, truncated: bool) -> Overlong:
    """The error for one example, with what to do."""
    why = " even without its older turns" if truncated else ""
    remedy = "drop" if truncated else "drop or truncate"
    return Overlong(
        f"{length} tokens{why}, data.sequence_length is {limit}",
        f"raise it, set data.overlong={remedy}, or shorten it",
    )
