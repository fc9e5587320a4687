"""What the verbs on rows (sft, reward, preference) share: tokenizing once, step sources, the length of a stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from nemo_align.config.data import RowsConfig
from nemo_align.config.stages import TrainStageConfig
from nemo_align.data.source import RowSource
from nemo_align.data.tokenized_rows import TokenizedRows
from nemo_align.runtime.rank_order import rank_zero_first
from nemo_align.training.session import Session
from nemo_align.training.step_layout import micro_batch_capacity, step_layout

Tokenize = Callable[[dict[str, RowsConfig]], TokenizedRows]


def cache_directory(session: Session) -> Path:
    """Where tokenized rows, sample indices and reference log-probabilities lie."""
    return Path(session.config.data.cache_dir or session.run_dir / "cache")


def tokenize_all(session: Session, tokenize: Tokenize) -> tuple[TokenizedRows, dict[str, TokenizedRows]]:
    """Training rows, and each held-out set by name; made by rank 0, opened by the others."""
    data = session.config.data

    def every_set() -> tuple[TokenizedRows, dict[str, TokenizedRows]]:
        return tokenize(data.train), {name: tokenize({name: rows}) for name, rows in data.validation.items()}

    return rank_zero_first(session.topology, session.stop, every_set)


def row_source(
    session: Session,
    rows: TokenizedRows,
    *,
    kind: str,
    extra_targets: dict[str, np.ndarray] | None = None,
) -> RowSource:
    """Exact batches over `rows` for this data-parallel rank."""
    config = session.config
    assert isinstance(config, TrainStageConfig)
    return packed_source(
        session,
        rows,
        kind=kind,
        capacity=micro_batch_capacity(config),
        packing=config.train.packing,
        micro_batch_size=config.train.micro_batch_size,
        extra_targets=extra_targets,
    )


def packed_source(
    session: Session,
    rows: TokenizedRows,
    *,
    kind: str,
    capacity: int,
    packing: bool = True,
    micro_batch_size: int = 1,
    extra_targets: dict[str, np.ndarray] | None = None,
) -> RowSource:
    """The same with the packing spelt out. `capacity`: tokens of a micro-batch, or without packing of one example."""
    config, topology = session.config, session.topology
    layout = step_layout(
        config.model,
        config.parallel,
        config.precision,
        topology,
        capacity=capacity,
        packing=packing,
        micro_batch_size=micro_batch_size,
    )
    return RowSource(
        rows,
        layout=layout,
        data_rank=topology.data_rank,
        seed=config.runtime.seed,
        kind=kind,
        extra_targets=extra_targets,
    )


def num_examples(config: TrainStageConfig, rows_per_epoch: int) -> int:
    """Examples that a stage trains on: `train.epochs` passes, or what `train.max_steps` batches take."""
    if config.train.epochs is not None:
        return max(1, round(config.train.epochs * rows_per_epoch))
    assert config.train.max_steps is not None, "validated: one of epochs and max_steps"
    return config.train.max_steps * config.train.global_batch_size
