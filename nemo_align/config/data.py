"""Schema of the `data` group, one class per kind of dataset."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass(kw_only=True)
class IndexedSourceConfig:
    """One Megatron `.bin`/`.idx` pair."""

    path: str = MISSING  # prefix without .bin or .idx


@dataclass(kw_only=True)
class BlendSourceConfig(IndexedSourceConfig):
    """One pair of a pretraining blend."""

    weight: float = 1.0  # share of the samples; weights of a blend are normalised


@dataclass(kw_only=True)
class PhaseConfig:
    """A part of pretraining with one blend. The sample count is fixed by `steps`, whenever a run stops."""

    steps: int = MISSING  # optimizer steps of this phase
    blend: dict[str, BlendSourceConfig] = field(default_factory=dict)


@dataclass(kw_only=True)
class PretrainDataConfig:
    """Next-token data in phases, in the order written, under one learning-rate schedule."""

    tokenizer: str | None = None  # SentencePiece file or Hugging Face folder; null: that of checkpoint.init_from
    root: str = "data"  # folder that experiments find their files in: ${data.root}/pretrain/english
    sequence_length: int | None = None  # tokens per sample; null: model.max_sequence_length
    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    validation: dict[str, IndexedSourceConfig] = field(default_factory=dict)  # each its own held-out set, read whole
    cache_dir: str | None = None  # sample indices; null: <run_dir>/cache


@dataclass(kw_only=True)
class RowsConfig:
    """A file, or a Hugging Face dataset folder, of rows."""

    path: str = MISSING  # .jsonl, .jsonl.gz, .json, .parquet or a folder written by datasets.save_to_disk
    format: str = "auto"  # auto, or a row format of nemo_align/data/row_formats
    max_rows: int | None = None  # seeded choice of that many rows
    fraction: float | None = None  # seeded choice of that part of the rows (0..1]


@dataclass(kw_only=True)
class ChatDataConfig:
    """What sft, reward, preference and score have in common."""

    tokenizer: str | None = None  # SentencePiece file or Hugging Face folder; null: that of checkpoint.init_from
    root: str = "data"  # folder that experiments find their files in: ${data.root}/code_sft/train.jsonl
    sequence_length: int | None = None  # longest sequence in tokens; null: model.max_sequence_length
    overlong: str = "error"  # error | drop | truncate (the oldest turns)
    bad_rows: str = "error"  # error | quarantine (leave wrong rows out, written with the reason beside the cache)
    default_system: str = ""  # system turn of rows that have none
    cache_dir: str | None = None  # tokenized rows; null: <run_dir>/cache


@dataclass(kw_only=True)
class RowsDataConfig(ChatDataConfig):
    """What the verbs that train on rows have in common."""

    train: dict[str, RowsConfig] = field(default_factory=dict)
    validation: dict[str, RowsConfig] = field(default_factory=dict)  # each its own held-out set


@dataclass(kw_only=True)
class SftDataConfig(RowsDataConfig):
    """Dialogues; the loss is on assistant turns and the token that ends each."""

    overlong: str = "truncate"


@dataclass(kw_only=True)
class RewardDataConfig(RowsDataConfig):
    """Dialogues with one number per attribute; the reward token is appended."""


@dataclass(kw_only=True)
class SelectConfig:
    """Which pairs are trained on. Counts of what is left out are reported."""

    min_chosen_reward: float | None = None  # pairs whose chosen response is rated lower are left out
    min_reward_gap: float | None = None  # chosen_reward - rejected_reward at least this
    inverted: str = "error"  # chosen reward below rejected: error | swap | keep
    ties: str = "auto"  # equal rewards: drop | keep | auto (drop for dpo and ipo, keep for rpo)


@dataclass(kw_only=True)
class PreferenceDataConfig(RowsDataConfig):
    """Pairs of responses to one prompt, with or without rewards."""

    select: SelectConfig = field(default_factory=SelectConfig)


@dataclass(kw_only=True)
class ScoreDataConfig(ChatDataConfig):
    """Rows to be scored, which `inputs` names."""
