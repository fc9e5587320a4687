"""The table at the end of a pipeline: what each stage learnt, and how fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from nemo_align.pipeline.manifest import Manifest, StageRecord
from nemo_align.training.progress import clock

# Held-out metrics that stand for a stage: (name, label, format, whether higher is better).
KEY_METRICS: dict[str, tuple[tuple[str, str, str, bool], ...]] = {
    "pretrain": (("loss", "loss", "{:.3f}", False),),
    "sft": (("loss", "loss", "{:.3f}", False),),
    "reward": (
        ("pearson", "Pearson", "{:.3f}", True),
        ("mae", "MAE", "{:.3f}", False),
    ),
    "preference": (
        ("rewards/accuracies", "accuracy", "{:.3f}", True),
        ("rewards/margins", "margin", "{:.4f}", True),
        ("loss", "loss", "{:.4f}", False),
    ),
    "score": (),
}


@dataclass(frozen=True)
class Change:
    """A held-out metric at the start and at the end of a stage; the mean over its held-out sets."""

    label: str
    first: float | None
    last: float
    form: str
    better: bool | None  # None: not comparable

    def __str__(self) -> str:
        last = self.form.format(self.last)
        return (
            f"{self.label} {self.form.format(self.first)} → {last}"
            if self.first is not None
            else f"{self.label} {last}"
        )


def held_out(metrics: Mapping[str, float], name: str) -> float | None:
    """Mean over the held-out sets of `validation/<set>/<name>`; None where no set has it."""
    found = [
        value
        for key, value in metrics.items()
        if key.count("/") >= 2 and key.split("/", 2)[0] == "validation" and key.split("/", 2)[2] == name
        if value is not None
    ]
    return sum(found) / len(found) if found else None


def key_changes(record: StageRecord) -> list[Change]:
    """The metrics that stand for a stage, as far as it has them."""
    first, last = record.metrics.get("first", {}), record.metrics.get("last", {})
    changes = []
    for name, label, form, higher in KEY_METRICS.get(record.verb, ()):
        before, after = held_out(first, name), held_out(last, name)
        if after is not None:
            better = None if before is None or before == after else (after > before) == higher
            changes.append(Change(label, before, after, form, better))
    if record.verb == "reward" and (baseline := held_out(last, "mae_of_mean")) is not None:
        changes.append(Change("MAE of the mean", None, baseline, "{:.3f}", None))
    return changes


def layout_text(record: StageRecord) -> str:
    """TP2 PP2 DP1, with VP and SP where they are on."""
    layout = record.layout
    if not layout:
        return "-"
    text = f"TP{layout.get('tensor', 1)} PP{layout.get('pipeline', 1)} DP{layout.get('data', 1)}"
    if layout.get("virtual_pipeline", 1) > 1:
        text += f" VP{layout['virtual_pipeline']}"
    return text + (" SP" if layout.get("sequence") else "")


def print_table(manifest: Manifest, console: Console | None = None) -> None:
    """Print the table: drawn on a terminal, plain text elsewhere."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console = Console(file=console.file, width=200, highlight=False, color_system=None)
    table = Table(title=manifest.recipe, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("stage", "verb", "status", "layout"):
        table.add_column(name, no_wrap=True)
    for name in ("steps", "tokens", "time", "tokens/s", "MFU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("held out: first → last", overflow="fold")
    for record in manifest.stages:
        table.add_row(*row(record))
    console.print(table)
    for record in manifest.stages:
        if record.reason is not None:
            console.print(f"{record.name} {record.status}{_where(record)}: {record.reason}", markup=False)


def _where(record: StageRecord) -> str:
    where = [f"job {record.job_id}"] if record.job_id else []
    where += [f"nodes {record.nodes}"] if record.nodes else []
    where += [f"exit code {record.exit_code}"] if record.exit_code else []
    return f" ({', '.join(where)})" if where else ""


def row(record: StageRecord) -> tuple[str, ...]:
    """Cells of one stage; tokens/s are those of all its devices."""
    devices = record.layout.get("world_size", 1)
    rate = record.tokens_per_second_per_gpu
    return (
        record.name,
        record.verb,
        record.status,
        layout_text(record),
        f"{record.steps:,}" if record.steps else "-",
        f"{record.tokens:,}" if record.tokens else "-",
        clock(record.seconds) if record.seconds else "-",
        f"{rate * devices:,.0f}" if rate else "-",
        f"{record.mfu:.1%}" if record.mfu is not None else "-",
        "  ".join(str(change) for change in key_changes(record)) or "-",
    )
