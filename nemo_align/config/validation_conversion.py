"""Checks of the verbs that read and write checkpoints without training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nemo_align.config.conversion import ConvertConfig, MergeConfig, TransferConfig
from nemo_align.config.sizes import parse_size

_WRITING_NEMO = (
    "to=nemo is not offered: NeMo packs a live model that it holds whole in memory, by classes that it has dropped "
    "since (docs/conversion.md). Convert to hf or megatron"
)


def check_convert(config: ConvertConfig, check_files: bool) -> Iterator[str]:
    """What is wrong with the configuration of `convert`."""
    if config.target_format == "nemo":
        yield _WRITING_NEMO
    elif config.source_format == config.target_format:
        yield f"from and to are both {config.source_format}: nothing to convert"
    if config.source is None and not (config.plan and config.architecture):
        yield "source is missing: checkpoint to read. Example: source=runs/sft"
    elif config.source is not None and config.architecture is not None:
        yield f"architecture={config.architecture} goes with plan=true and no source: the sizes are those of the source"
    elif check_files and config.source is not None and not Path(config.source).exists():
        yield f"source={config.source} does not exist"
    if config.target is None and not config.plan:
        yield "target is missing: folder to write. Example: target=exported/sft"
    yield from _check_transfer(config)


def check_merge(config: MergeConfig, check_files: bool) -> Iterator[str]:
    """What is wrong with the configuration of `merge`."""
    count = len(config.sources)
    if config.target_format == "nemo":
        yield _WRITING_NEMO
    if count < 2:
        yield "sources are missing: two checkpoints or more. Example: sources=[runs/rpo_1,runs/rpo_2]"
    for source in config.sources if check_files else ():
        if not Path(source).exists():
            yield f"sources: {source} does not exist"
    if config.method == "slerp":
        if count > 2:
            yield f"method=slerp goes between two sources, not {count}: use method=linear"
        if config.weights is not None:
            yield "method=slerp has no weights: set t"
        if not 0 <= config.t <= 1:
            yield f"t={config.t} must lie between 0 (the first source) and 1 (the second)"
    elif config.weights is not None:
        if len(config.weights) != count:
            yield f"weights has {len(config.weights)} numbers for {count} sources"
        if config.normalize and not sum(config.weights) > 0:
            yield f"weights sum to {sum(config.weights):g}: their sum must be positive, or set normalize=false"
    yield from _check_transfer(config)


def _check_transfer(config: TransferConfig) -> Iterator[str]:
    for key in ("shard_size", "max_memory"):
        try:
            parse_size(getattr(config, key), key)
        except ValueError as error:
            yield str(error)
    if config.workers is not None and config.workers < 1:
        yield f"workers={config.workers} must be at least 1, or null"
