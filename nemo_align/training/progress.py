"""What a person watches: a live line with the time left on a terminal, plain log lines elsewhere.

Nothing here looks at a device, and a redraw happens at most four times a second, so it costs a step nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

logger = logging.getLogger("nemo_align")

REDRAW_SECONDS = 0.25
# Seconds per step are averaged with this weight for the newest step, so the time left follows a ramp of the batch size.
NEWEST_WEIGHT = 0.1

# Metrics of the line in this order, where the record has them: (key, label, format).
SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("rewards/accuracies", "accuracy", "{:.3f}"),
    ("rewards/margins", "margin", "{:.4f}"),
    ("grad_norm", "grad norm", "{:.3g}"),
    ("lr", "lr", "{:.2e}"),
    ("perf/tokens_per_second_per_gpu", "tokens/s/gpu", "{:,.0f}"),
    ("perf/mfu", "MFU", "{:.1%}"),
)


class Progress:
    """Progress of one pass (training, validation, reference, scoring) over `total` steps; use as a context manager.

    `enabled` is False on every rank but the main one. Steps count from `start`, which is above 0 after a resume.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        start: int = 0,
        log_every: int = 1,
        enabled: bool = True,
        console: Console | None = None,
    ) -> None:
        self.title = title
        self.total = total
        self.step = start
        self.log_every = max(1, log_every)
        self.enabled = enabled
        self._console = console if console is not None else Console(stderr=True, highlight=False)
        self._seconds_per_step: float | None = None
        self._last = self._drawn = 0.0
        self._metrics: dict[str, object] = {}
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._last = time.monotonic()
        if self.enabled and self._console.is_terminal:
            # Rich stands in for sys.stderr while the line lives; runtime/logs.py writes to whatever sys.stderr is, so
            # log lines pass above it.
            self._live = Live(self._line(), console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, step: int, metrics: Mapping[str, object] | None = None) -> None:
        """Step `step` is done. Call on every step; what is shown is thinned out here."""
        if not self.enabled:
            return
        now = time.monotonic()
        if step > self.step:
            seconds = (now - self._last) / (step - self.step)
            before = self._seconds_per_step
            self._seconds_per_step = seconds if before is None else before + NEWEST_WEIGHT * (seconds - before)
        self._last, self.step = now, step
        self._metrics = dict(metrics or {})
        if self._live is None:
            if step % self.log_every == 0 or step == self.total:
                logger.info("%s", self.plain())
        elif now - self._drawn >= REDRAW_SECONDS or step == self.total:
            self._drawn = now
            self._live.update(self._line(), refresh=True)

    def pause(self) -> None:
        """Time from here to the next `resume` (a validation, a save) is not a step's."""
        self._last = time.monotonic() - self._last

    def resume(self) -> None:
        """Ends `pause`."""
        self._last = time.monotonic() - self._last

    def close(self) -> None:
        """Leave the last line standing and give sys.stderr back."""
        if self._live is not None:
            self._live.update(self._line(), refresh=True)
            self._live.stop()
            self._live = None

    def plain(self) -> str:
        """The line as text: the same fields in the same order on every step."""
        return "  ".join([f"{self.title} {self.step}/{self.total}", *self._fields(), f"left {self.time_left()}"])

    def time_left(self) -> str:
        """h:mm:ss until the last step at the present speed; '-' before the first."""
        if self._seconds_per_step is None:
            return "-"
        return clock(self._seconds_per_step * max(0, self.total - self.step))

    def _fields(self) -> list[str]:
        return [
            f"{label} {form.format(value)}"
            for key, label, form in SHOWN
            if (value := self._metrics.get(key)) is not None
        ]

    def _line(self) -> Table:
        done = 0.0 if self.total == 0 else min(1.0, self.step / self.total)
        filled = round(24 * done)
        row = Table.grid(padding=(0, 1))
        row.add_row(
            Text(self.title, style="bold"),
            Text("━" * filled, style="green") + Text("━" * (24 - filled), style="bright_black"),
            Text(f"{self.step}/{self.total}"),
            Text("  ".join(self._fields())),
            Text(f"left {self.time_left()}", style="cyan"),
        )
        return row


def clock(seconds: float) -> str:
    """12 -> 0:12, 3725 -> 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
