"""manifest.json of a pipeline: where each stage stands. Rewritten atomically whenever that changes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nemo_align.training.metrics import finite, write_atomically
from nemo_align.training.result import StageResult

MANIFEST_FILE = "manifest.json"
TAKEN_OVER = (
    "mfu",
    "mfu_padded",
    "mfu_causal",
    "tokens_per_second_per_gpu",
    "peak_tflops",
    "peak_source",
    "steps",
    "tokens",
    "forward_only",
)  # from a stage's result
STATUSES = ("pending", "running", "complete", "failed", "stopped", "cancelled")


@dataclass(kw_only=True)
class StageRecord:
    """One stage. Paths are as the commands name them; seconds are wall time."""

    name: str
    verb: str
    status: str = "pending"
    run_dir: str = ""
    config_hash: str | None = None  # of the resolved configuration it was started with
    input: str | None = None  # checkpoint that its weights come from
    inputs: dict[str, str] = field(default_factory=dict)  # identity of each earlier stage's output that it read
    output: str | None = None  # its final checkpoint, or the folder of the rows it wrote
    identity: str | None = None  # of that output
    layout: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # "first" and "last" on the held-out sets
    mfu: float | None = None
    mfu_padded: float | None = None
    mfu_causal: float | None = None
    tokens_per_second_per_gpu: float | None = None
    peak_tflops: float | None = None
    peak_source: str | None = None
    steps: int | None = None
    tokens: int | None = None
    forward_only: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0  # of all its starts; of the run itself where SLURM starts it
    restarts: int = 0
    exit_code: int | None = None  # of its last end
    reason: str | None = None  # for its last end, unless it is complete
    job_id: str | None = None  # of SLURM
    nodes: str | None = None  # of its last start: SLURM's node list, or the host
    hf: str | None = None  # exported Hugging Face folder

    def finish(self, result: StageResult) -> None:
        """Take over what the stage says of itself at its end."""
        run_dir = Path(self.run_dir)
        self.status, self.reason = "complete", None
        self.input = result.input
        self.output = str(run_dir / result.output) if result.output else str(run_dir)
        self.layout = result.layout
        self.metrics = {"first": result.first, "last": result.last}
        for name in TAKEN_OVER:
            setattr(self, name, getattr(result, name))
        self.seconds = self.seconds or result.seconds
        self.hf = str(run_dir / result.hf) if result.hf else None


@dataclass(kw_only=True)
class Manifest:
    """All stages of a recipe, in order."""

    recipe: str
    command: list[str] = field(default_factory=list)  # overrides of the command that started it last
    stages: list[StageRecord] = field(default_factory=list)

    def __getitem__(self, name: str) -> StageRecord:
        return next(record for record in self.stages if record.name == name)

    def write(self, run_dir: Path | str) -> None:
        """Write <run_dir>/manifest.json."""
        assert all(record.status in STATUSES for record in self.stages)
        path = Path(run_dir) / MANIFEST_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(finite(asdict(self)), indent=2, allow_nan=False) + "\n")


def read_manifest(run_dir: Path | str) -> Manifest | None:
    """The manifest in `run_dir`, None without one. Raises ValueError for a damaged file."""
    path = Path(run_dir) / MANIFEST_FILE
    if not path.exists():
        return None
    known = {entry.name for entry in fields(StageRecord)}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        stages = [
            StageRecord(**{key: value for key, value in stage.items() if key in known}) for stage in values["stages"]
        ]
        return Manifest(recipe=values["recipe"], command=values["command"], stages=stages)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}): delete it; what the stages themselves wrote is "
            "enough to go on"
        ) from None


def update(manifest: Manifest | None, recipe: str, command: list[str], stages: list[tuple[str, str, Path]]) -> Manifest:
    """The manifest of a recipe's (name, verb, run_dir) stages, with what is known of those that still belong to it."""
    known = {(record.name, record.verb): record for record in manifest.stages} if manifest else {}
    records = []
    for name, verb, run_dir in stages:
        record = known.get((name, verb)) or StageRecord(name=name, verb=verb)
        record.run_dir = str(run_dir)
        records.append(record)
    return Manifest(recipe=recipe, command=command, stages=records)
