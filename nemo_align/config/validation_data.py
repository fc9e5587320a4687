"""Checks of the `data` group: lengths, sources, files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class NamedFile:
    """A file or folder that a configuration reads."""

    key: str
    value: str  # of the key
    path: str  # a pair of a blend is two files

    def __str__(self) -> str:
        named = f"{self.key}={self.value}"
        return named if self.path == self.value else f"{named}: {self.path}"


def files_of(config: WorkerConfig) -> Iterator[NamedFile]:
    """The tokenizer and the data, whether they are there or not."""
    data = config.data
    if data.tokenizer is not None:
        yield NamedFile("data.tokenizer", data.tokenizer, data.tokenizer)
    if isinstance(data, PretrainDataConfig):
        pairs = {
            f"data.phases.{name}.blend.{source}.path": entry.path
            for name, phase in data.phases.items()
            for source, entry in phase.blend.items()
        }
        pairs |= {f"data.validation.{name}.path": entry.path for name, entry in data.validation.items()}
        for key, prefix in pairs.items():
            if not prefix.endswith((".bin", ".idx")):  # which is refused
                yield from (NamedFile(key, prefix, f"{prefix}{suffix}") for suffix in (".bin", ".idx"))
    if isinstance(data, RowsDataConfig):
        for split in ("train", "validation"):
            for name, rows in getattr(data, split).items():
                yield NamedFile(f"data.{split}.{name}.path", rows.path, rows.path)
    if isinstance(config, ScoreStageConfig):
        yield from (NamedFile(f"inputs.{name}", path, path) for name, path in config.inputs.items())


def missing_files(config: WorkerConfig) -> Iterator[NamedFile]:
    """Those of `files_of` that are not there."""
    yield from (file for file in files_of(config) if not Path(file.path).exists())


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
    if isinstance(config, PretrainStageConfig):
        yield from _check_phases(config.data)
    else:
        yield from _check_micro_batch_tokens(config)
    if isinstance(config, ScoreStageConfig):
        yield from _check_inputs(config)
    if isinstance(data, RowsDataConfig):
        for split in ("train", "validation"):
            for name, rows in getattr(data, split).items():
                yield from _check_rows(f"data.{split}.{name}", rows, ROW_FORMATS[_VERBS[type(config)]])
        if not data.train:
            yield "data.train is empty: name the rows to train on. Example: data.train.mine.path=rows.jsonl"
    if check_files:
        yield from say_all_missing(config, list(missing_files(config)))


def say_all_missing(config: WorkerConfig, files: Sequence[NamedFile]) -> Iterator[str]:
    """The messages of files that are not there; first of all that of their folder, if that is not there."""
    root = Path(config.data.root)
    if not root.exists() and any(Path(file.path).is_relative_to(root) for file in files):
        yield f"data.root={root} does not exist: name the folder that holds the data, data.root=<folder>"
    yield from map(say_missing, files)


def say_missing(file: NamedFile) -> str:
    """The message of a file that is not there."""
    what = ": name a SentencePiece file or a Hugging Face folder" if file.key == "data.tokenizer" else ""
    return f"{file} does not exist{what}"


def _check_phases(data: PretrainDataConfig) -> Iterator[str]:
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
            yield from _check_indexed(f"{key}.blend.{source}", entry)
    for name, entry in data.validation.items():
        yield from _check_indexed(f"data.validation.{name}", entry)


def _check_indexed(key: str, entry: IndexedSourceConfig) -> Iterator[str]:
    if isinstance(entry, BlendSourceConfig) and not 0 < entry.weight < float("inf"):
        yield f"{key}.weight is {entry.weight}, but must be positive; ~{key} takes the source out"
    if entry.path.endswith((".bin", ".idx")):
        yield f"{key}.path={entry.path} must be the prefix of both files: {entry.path[:-4]}"


def _check_rows(key: str, rows: RowsConfig, formats: tuple[str, ...]) -> Iterator[str]:
    if rows.format not in formats:
        guess = suggest.did_you_mean(rows.format, formats)
        yield f"{key}.format is '{rows.format}', but must be one of {', '.join(formats)}{guess}"
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


def _check_inputs(config: ScoreStageConfig) -> Iterator[str]:
    if not config.inputs:
        yield "inputs is empty: name the rows to score. Example: inputs.pairs=pairs.jsonl"
    for name in config.inputs:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            yield f"inputs.{name}: the name becomes a file, so use letters, digits, _, - and ."
