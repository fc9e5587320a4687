"""Checks of the `data` group: lengths, sources, files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from nemo_align.config import suggest
from nemo_align.config.choices import ROW_FORMATS
from nemo_align.config.data import (
    BlendSourceConfig,
    IndexedSourceConfig,
    PretrainDataConfig,
    RowsConfig,
    RowsDataConfig,
)
from nemo_align.config.stages import (
    PreferenceStageConfig,
    PretrainStageConfig,
    RewardStageConfig,
    ScoreStageConfig,
    SftStageConfig,
    TrainStageConfig,
    WorkerConfig,
)

_VERBS = {SftStageConfig: "sft", RewardStageConfig: "reward", PreferenceStageConfig: "preference"}


def check_length(config: WorkerConfig) -> Iterator[str]:
    """Sequences against the positions of the model."""
    length, most = config.data.sequence_length, config.model.max_sequence_length
    if length is not None and length > most:
        yield f"data.sequence_length {length} is more than model.max_sequence_length {most}: lower it to {most} or less"


def check_data(config: WorkerConfig, check_files: bool) -> Iterator[str]:
    """Everything else in `data`; `check_files` looks on the disk too.

    A length that is still null here is that of a model which is not known yet.
    """
    data = config.data
    if data.sequence_length is not None and data.sequence_length < 2:
        yield f"data.sequence_length is {data.sequence_length}, but must be at least 2 tokens"
    if check_files and data.tokenizer is not None and not Path(data.tokenizer).exists():
        yield f"data.tokenizer={data.tokenizer} does not exist: name a SentencePiece file or a Hugging Face folder"
    if isinstance(config, PretrainStageConfig):
        yield from _check_phases(config.data, check_files)
        return
    yield from _check_micro_batch_tokens(config)
    if isinstance(config, ScoreStageConfig):
        yield from _check_inputs(config, check_files)
        return
    assert isinstance(data, RowsDataConfig)
    for split in ("train", "validation"):
        for name, rows in getattr(data, split).items():
            yield from _check_rows(f"data.{split}.{name}", rows, ROW_FORMATS[_VERBS[type(config)]], check_files)
    if not data.train:
        yield "data.train is empty: name the rows to train on. Example: data.train.mine.path=rows.jsonl"


def _check_phases(data: PretrainDataConfig, check_files: bool) -> Iterator[str]:
    if not data.phases:
        yield (
            "data.phases is empty: name at least one phase. Example: data.phases.main.steps=1000 "
            "data.phases.main.blend.english.path=data/english"
        )
    for name, phase in data.phases.items():
        key = f"data.phases.{name}"
        if phase.steps < 1:
            yield f"{key}.steps is {phase.steps}, but must be at least 1; ~{key} takes the phase out"
        if not phase.blend:
            yield f"{key}.blend is empty. Example: {key}.blend.english.path=data/english"
        for source, entry in phase.blend.items():
            yield from _check_indexed(f"{key}.blend.{source}", entry, check_files)
    for name, entry in data.validation.items():
        yield from _check_indexed(f"data.validation.{name}", entry, check_files)


def _check_indexed(key: str, entry: IndexedSourceConfig, check_files: bool) -> Iterator[str]:
    if isinstance(entry, BlendSourceConfig) and not 0 < entry.weight < float("inf"):
        yield f"{key}.weight is {entry.weight}, but must be positive; ~{key} takes the source out"
    if entry.path.endswith((".bin", ".idx")):
        yield f"{key}.path={entry.path} must be the prefix of both files: {entry.path[:-4]}"
    elif check_files:
        for suffix in (".bin", ".idx"):
            if not Path(entry.path + suffix).is_file():
                yield f"{key}.path={entry.path}: {entry.path}{suffix} does not exist"


def _check_rows(key: str, rows: RowsConfig, formats: tuple[str, ...], check_files: bool) -> Iterator[str]:
    if rows.format not in formats:
        guess = suggest.did_you_mean(rows.format, formats)
        yield f"{key}.format is '{rows.format}', but must be one of {', '.join(formats)}{guess}"
    if check_files and not Path(rows.path).exists():
        yield f"{key}.path={rows.path} does not exist"
    if rows.fraction is not None and not 0 < rows.fraction <= 1:
        yield f"{key}.fraction is {rows.fraction}, but must lie in (0, 1]"
    if rows.max_rows is not None and rows.max_rows < 1:
        yield f"{key}.max_rows is {rows.max_rows}, but must be at least 1"
    if rows.fraction is not None and rows.max_rows is not None:
        yield f"{key} has both max_rows and fraction: choose one"


def _check_micro_batch_tokens(config: WorkerConfig) -> Iterator[str]:
    if isinstance(config, ScoreStageConfig):
        key, tokens = "micro_batch_tokens", config.micro_batch_tokens
    else:
        assert isinstance(config, TrainStageConfig)
        key, tokens = "train.micro_batch_tokens", config.train.micro_batch_tokens
    if config.data.sequence_length is None:
        return
    sequences = 2 if isinstance(config, PreferenceStageConfig) else 1
    least = sequences * config.data.sequence_length
    if tokens is not None and tokens < least:
        what = "two responses, each as long as data.sequence_length" if sequences == 2 else "one data.sequence_length"
        yield f"{key} {tokens} does not hold {what} ({least} tokens): raise it to {least} or lower data.sequence_length"


def _check_inputs(config: ScoreStageConfig, check_files: bool) -> Iterator[str]:
    if not config.inputs:
        yield "inputs is empty: name the rows to score. Example: inputs.pairs=pairs.jsonl"
    for name, path in config.inputs.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            yield f"inputs.{name}: the name becomes a file, so use letters, digits, _, - and ."
        if check_files and not Path(path).exists():
            yield f"inputs.{name}={path} does not exist"
