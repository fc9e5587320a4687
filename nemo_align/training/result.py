"""result.json: what a finished stage says of itself to the pipeline, the report and the user. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from nemo_align.training.metrics import finite, write_atomically

RESULT_FILE = "result.json"


@dataclass(kw_only=True)
class StageResult:
    """The end of a run that completed. Paths are relative to the run directory, except `input`."""

    verb: str
    experiment: str
    status: str = "complete"
    steps: int = 0
    examples: int = 0  # trained on, or scored
    tokens: int = 0  # real ones
    seconds: float = 0.0  # the whole run, start-up and validation included, restarts too
    train_seconds: float = 0.0
    layout: dict[str, int] = field(default_factory=dict)
    input: str | None = None  # checkpoint that the weights came from
    output: str | None = None  # "checkpoints/step_0000200"
    first: dict[str, float] = field(default_factory=dict)  # validation metrics at the start
    last: dict[str, float] = field(default_factory=dict)  # and at the end
    mfu: float | None = None  # of the training steps, 0..1
    mfu_padded: float | None = None
    mfu_causal: float | None = None  # attention halved, as Megatron-LM counts it
    tokens_per_second_per_gpu: float | None = None
    peak_tflops: float | None = None  # per device
    peak_source: str | None = None
    forward_only: dict[str, dict[str, float]] = field(default_factory=dict)  # name -> {"seconds", "mfu", ...}
    steps_left_out: int = 0  # first steps that mfu and tokens/s leave out
    hf: str | None = None  # "hf" if exported
    outputs: dict[str, str] = field(default_factory=dict)  # files of rows that `score` wrote, by name


def write_result(run_dir: Path | str, result: StageResult) -> Path:
    """Write <run_dir>/result.json atomically; numbers that are not finite become null."""
    path = Path(run_dir) / RESULT_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(finite(asdict(result)), indent=2, allow_nan=False) + "\n")
    return path


def read_result(run_dir: Path | str) -> StageResult | None:
    """The result of the run in `run_dir`, None if it has not finished. Raises ValueError for a damaged file."""
    path = Path(run_dir) / RESULT_FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {entry.name for entry in fields(StageResult)}
        return StageResult(**{key: value for key, value in values.items() if key in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it and start the same command again") from None
