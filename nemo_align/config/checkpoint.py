"""Schema of the `checkpoint` group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class InitialWeightsConfig:
    """Where weights come from."""

    init_from: str | None = None  # run directory, checkpoint or Hugging Face folder; null: random weights


@dataclass(kw_only=True)
class CheckpointConfig(InitialWeightsConfig):
    """Where weights come from and when they are saved."""

    load_optimizer: bool = False  # Adam's moments of init_from too
    save_every: int | None = None  # steps; null: only at the end and on a signal
    asynchronous: bool = True  # periodic saves are written beside the training steps, from a copy in host memory
    fully_reshardable: bool = False  # periodic saves too load under any layout; they take longer to write
    keep_last: int = 2  # periodic checkpoints to keep; the final one always stays
    export_hf: bool = False  # write <run_dir>/hf at the end
