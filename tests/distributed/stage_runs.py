"""Running whole stages on a pool of workers, and reading what they logged."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from tests.distributed.pool import WorkerPool, with_topology
from tests.stage_inputs import MODEL


def run_in_worker(topology: Any, verb: str, config_path: str) -> None:
    """In a worker: one rank of a stage, through the stage's entry point."""
    from nemo_align.config.compose import load_resolved
    from nemo_align.runtime.signals import StopRequest

    run = importlib.import_module(f"nemo_align.stages.{verb}").run
    afterwards = run(load_resolved(verb, config_path), topology, StopRequest())
    if afterwards is not None:
        afterwards()


def run_stage(
    pool: WorkerPool, verb: str, run_dir: Path, overrides: list[str], parallel: dict[str, Any] | None = None
) -> list[dict]:
    """Run `verb` on all workers of `pool` and return the records of metrics.jsonl."""
    from nemo_align.config.compose import compose, to_yaml
    from nemo_align.training.metrics import read_metrics

    parallel = parallel or {}
    layout = [f"parallel.{key}={str(value).lower()}" for key, value in parallel.items()]
    starts = any(text.startswith("checkpoint.init_from") for text in overrides)
    model = [text for text in MODEL if text.startswith("precision")] if starts else MODEL
    config = compose(verb, [*model, *overrides, *layout, f"run_dir={run_dir}"])
    path = run_dir / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(config))
    pool.run(with_topology, run_in_worker, parallel, verb, str(path))
    return read_metrics(run_dir)


def numbers(records: list[dict], kind: str) -> list[dict[str, float]]:
    """The numbers of each record of a kind that do not depend on time."""
    return [
        {key: value for key, value in record.items() if key != "kind" and not key.startswith("perf/")}
        for record in records
        if record["kind"] == kind
    ]
