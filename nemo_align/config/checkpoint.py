"""Schema of the `checkpoint` group and of the `convert` verb."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


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


@dataclass(kw_only=True)
class ConvertConfig:
    """`nemo-align convert from=... to=... source=... target=...`."""

    source_format: str = MISSING  # written `from=` on the command line: hf | megatron
    target_format: str = MISSING  # written `to=` on the command line: hf | megatron
    source: str = MISSING  # checkpoint to read
    target: str = MISSING  # folder to write
    dtype: str | None = None  # fp32 | bf16; null: as the source
    run_dir: str = "runs/convert"  # where the log goes
