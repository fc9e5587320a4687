"""TensorBoard and Weights & Biases beside metrics.jsonl, both at once if asked for. Imported only when asked for."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from nemo_align.config.training import TrackingConfig


class Tracker(Protocol):
    """Where metrics go besides metrics.jsonl."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Numbers of one step; values that are no numbers are left out."""
        ...

    def close(self) -> None: ...


def open_trackers(tracking: TrackingConfig, run_dir: Path | str, experiment: str, config: Mapping) -> list[Tracker]:
    """The trackers that the configuration names; call on the main rank only. `config`: the resolved configuration.

    Raises ValueError if a tracker's package is not installed.
    """
    trackers: list[Tracker] = []
    if tracking.tensorboard:
        trackers.append(TensorBoard(Path(run_dir) / "tensorboard"))
    if tracking.wandb:
        trackers.append(WeightsAndBiases(Path(run_dir), tracking.wandb_project, experiment, config))
    return trackers


class TensorBoard:
    """Event files in <run_dir>/tensorboard. A resumed run purges the steps it repeats."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(_missing("tensorboard", error)) from None
        self._folder = folder
        self._open = SummaryWriter
        self._writer = None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._writer is None:  # the first step to be logged is where events of an earlier process are out of date
            self._writer = self._open(str(self._folder), purge_step=step)
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """One W&B run per run directory: the id is kept there, so a resumed run goes on in the same one."""

    def __init__(self, run_dir: Path, project: str, experiment: str, config: Mapping) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(_missing("wandb", error)) from None
        id_file = run_dir / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        id_file.write_text(run_id + "\n")
        self._run = wandb.init(
            project=project, name=experiment, id=run_id, resume="allow", dir=str(run_dir), config=dict(config)
        )
        # W&B refuses a step lower than the last it saw, as a resumed run has; a metric of its own as x axis is exempt.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log({**numbers(metrics), "step": step})

    def close(self) -> None:
        self._run.finish()


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numeric entries, without the step itself."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, Real) and not isinstance(value, bool) and name != "step"
    }


def _missing(package: str, error: ImportError) -> str:
    return (
        f"tracking.{package}=true needs a package that is not installed ({error}): "
        f"pip install 'nemo_align[tracking]', or set tracking.{package}=false"
    )
