"""report.html: one page that shows a pipeline's stages, readable without a network and without this program.

matplotlib and jinja2 (extra `report`) are imported when a report is written, not before: ImportError without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from nemo_align import __version__
from nemo_align.pipeline.manifest import Manifest, StageRecord
from nemo_align.pipeline.table import Change, held_out, key_changes, layout_text, row
from nemo_align.training.metrics import read_metrics, write_atomically
from nemo_align.training.progress import clock
from nemo_align.training.result import read_result
from nemo_align.training.throughput import CONVENTION, STEPS_LEFT_OUT

REPORT_FILE = "report.html"
PAGE = Path(__file__).with_name("report.html.jinja")

# Charts of held-out metrics by verb: (title, metrics of one axis, those that are baselines).
HELD_OUT_CHARTS: dict[str, tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]] = {
    "reward": (
        ("Held-out Pearson correlation, mean over attributes", ("pearson",), ()),
        ("Held-out mean absolute error", ("mae", "mae_of_mean"), ("mae_of_mean",)),
    ),
    "preference": (
        ("Held-out accuracy", ("rewards/accuracies",), ()),
        ("Held-out margin", ("rewards/margins",), ()),
    ),
}


def write_report(run_dir: Path, manifest: Manifest) -> Path:
    """Write <run_dir>/report.html from the manifest and the stages' metrics.jsonl; returns its path."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from nemo_align.pipeline import charts

    stages = [_stage(record, charts) for record in manifest.stages]
    spent = {record.name: parts for record in manifest.stages if (parts := time_parts(record))}
    peaks = {
        f"{record.peak_tflops:.4g} TFLOP/s per device ({record.peak_source})": None
        for record in manifest.stages
        if record.peak_tflops
    }
    page = ImmutableSandboxedEnvironment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        PAGE.read_text(encoding="utf-8")
    )
    text = page.render(
        recipe=manifest.recipe,
        stages=stages,
        total={
            "tokens": f"{sum(record.tokens or 0 for record in manifest.stages if record.verb != 'score'):,}",
            "time": clock(sum(record.seconds for record in manifest.stages)),
        },
        time_chart=charts.stacked_seconds(spent, name="time") if spent else None,
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        convention=CONVENTION,
        left_out=STEPS_LEFT_OUT,
        peaks=list(peaks),
    )
    path = Path(run_dir) / REPORT_FILE
    write_atomically(path, text)
    return path


def time_parts(record: StageRecord) -> dict[str, float]:
    """Seconds of a stage by kind of work; what is left is start-up, data preparation and checkpoints."""
    result = read_result(record.run_dir)
    if result is None or not record.seconds:
        return {}
    parts = {"training": result.train_seconds}
    for name, rates in result.forward_only.items():
        parts[name] = rates.get("seconds", 0.0)
    rest = max(0.0, record.seconds - sum(parts.values()))
    return {name: value for name, value in (parts | {"start-up, data, checkpoints": rest}).items() if value}


def _stage(record: StageRecord, charts: Any) -> dict[str, Any]:
    records = read_metrics(record.run_dir)
    return {
        **{name: getattr(record, name) for name in ("name", "verb", "status", "input", "output", "hf", "run_dir")},
        "config_hash": record.config_hash,
        "restarts": record.restarts,
        "layout": layout_text(record) if record.layout else "",
        "cells": row(record),
        "changes": key_changes(record),
        "tiles": _tiles(record),
        "charts": _charts(record, records, charts),
        "metrics": _metrics(record),
    }


def _tiles(record: StageRecord) -> list[dict[str, str]]:
    if record.status != "complete":
        return []
    cells = row(record)
    tiles = [("tokens", cells[5], f"{cells[4]} steps" if record.steps else ""), ("time", cells[6], _restarts(record))]
    if record.tokens_per_second_per_gpu:
        tiles.append(("tokens/s", cells[7], f"{record.tokens_per_second_per_gpu:,.0f} per device"))
    if record.mfu is not None:
        notes = [f"padded {record.mfu_padded:.1%}"] if record.mfu_padded is not None else []
        notes += [f"causal {record.mfu_causal:.1%}"] if record.mfu_causal is not None else []
        tiles.append(("MFU", f"{record.mfu:.1%}", ", ".join(notes)))
    for name, rates in record.forward_only.items():
        share = rates.get("seconds", 0.0) / record.seconds if record.seconds else 0.0
        rate = f"MFU {rates['mfu']:.1%}, " if rates.get("mfu") is not None else ""
        tiles.append((f"forward only: {name}", f"{share:.0%} of time", f"{rate}{clock(rates.get('seconds', 0.0))}"))
    tiles += [(change.label, _last(change), _first(change)) for change in key_changes(record)]
    return [{"label": label, "value": value, "note": note} for label, value, note in tiles]


def _restarts(record: StageRecord) -> str:
    return f"{record.restarts} restart{'s' * (record.restarts > 1)}" if record.restarts else ""


def _last(change: Change) -> str:
    return change.form.format(change.last)


def _first(change: Change) -> str:
    return f"from {change.form.format(change.first)}" if change.first is not None else "held-out baseline"


def _charts(record: StageRecord, records: Sequence[Mapping[str, Any]], charts: Any) -> list[dict[str, str]]:
    train = [entry for entry in records if entry.get("kind") == "train"]
    validation = [entry for entry in records if entry.get("kind") == "validation"]
    drawn = []
    loss = _points(train, "loss")
    if loss:
        held = _sets(validation, "loss")
        drawn.append(("Loss", charts.training_curve(loss, held, name=f"{record.name}-loss")))
    for number, (title, names, baselines) in enumerate(HELD_OUT_CHARTS.get(record.verb, ())):
        series = {_label(name): points for name in names if (points := _mean_over_sets(validation, name))}
        if series:
            dashed = [_label(name) for name in baselines]
            drawn.append((title, charts.lines(series, name=f"{record.name}-{number}", dashed=dashed)))
    mfu = {
        label: points
        for label, key in (("MFU", "perf/mfu"), ("padded MFU", "perf/mfu_padded"))
        if (points := _points(train, key))
    }
    if mfu:
        drawn.append(("MFU per step", charts.rates(mfu, name=f"{record.name}-mfu", percent=True)))
    rate = _points(train, "perf/tokens_per_second_per_gpu")
    if rate:
        drawn.append(("Tokens/s per device", charts.rates({"real tokens": rate}, name=f"{record.name}-rate")))
    return [{"title": title, "svg": svg} for title, svg in drawn]


def _points(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[key]) for entry in records if entry.get(key) is not None]


def _sets(records: Sequence[Mapping[str, Any]], name: str) -> dict[str, list[tuple[float, float]]]:
    """Points of `validation/<set>/<name>` by set."""
    sets: dict[str, list[tuple[float, float]]] = {}
    for entry in records:
        for key, value in entry.items():
            parts = key.split("/", 2)
            if len(parts) == 3 and parts[0] == "validation" and parts[2] == name and value is not None:
                sets.setdefault(f"held out: {parts[1]}", []).append((entry["step"], value))
    return sets


def _mean_over_sets(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(entry["step"], value) for entry in records if (value := held_out(entry, name)) is not None]


def _label(name: str) -> str:
    return {"mae": "MAE", "mae_of_mean": "predicting the mean", "pearson": "Pearson"}.get(name, name)


def _metrics(record: StageRecord) -> list[dict[str, str]]:
    first, last = record.metrics.get("first", {}), record.metrics.get("last", {})

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.5g}"

    return [
        {"name": name.removeprefix("validation/"), "first": shown(first.get(name)), "last": shown(last.get(name))}
        for name in sorted(first.keys() | last.keys())
    ]
