"""Where a chain goes on: which stages are done and still valid, which run, and what must not be mixed."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_align.checkpoint.store import CheckpointReference, manifest_hash, read_manifest
from nemo_align.config import run_directory
from nemo_align.config.compose import ConfigError, load_resolved, to_yaml
from nemo_align.config.schema import MISSING
from nemo_align.pipeline.chain import Stage
from nemo_align.pipeline.manifest import Manifest
from nemo_align.training.result import read_result

# A finished stage need not be trained again when these change.
_FREE_KEYS = (*run_directory.FREE_KEYS, *run_directory.LAYOUT_KEYS)


def config_hash(config: Any) -> str:
    """Short hash of a resolved configuration."""
    return hashlib.blake2b(to_yaml(config).encode(), digest_size=8).hexdigest()


def is_complete(stage: Stage) -> bool:
    """Whether the stage ended with a result."""
    result = read_result(stage.run_dir)
    return result is not None and result.status == "complete"


def output_identity(stage: Stage) -> str | None:
    """What a finished stage wrote, as a short hash: of its final checkpoint, or of the rows it scored; None if gone."""
    result = read_result(stage.run_dir)
    assert result is not None
    if result.output:
        path = stage.run_dir / result.output
        if not path.is_dir():
            return None
        return manifest_hash(CheckpointReference("megatron", path, read_manifest(path)))
    digest = hashlib.blake2b(digest_size=16)
    for name in load_resolved(stage.verb, stage.run_dir / run_directory.CONFIG_FILE).inputs:
        path = stage.run_dir / f"{name}.jsonl"
        if not path.is_file():
            return None
        with open(path, "rb") as stream:
            digest.update(f"{name}:{hashlib.file_digest(stream, 'blake2b').hexdigest()};".encode())
    return digest.hexdigest()


def stages_to_run(stages: list[Stage], configs: dict[str, Any], manifest: Manifest) -> list[Stage]:
    """Stages that are not complete, in order.

    A complete stage stays as it is, and one that has begun goes on, if configuration and what it read are unchanged.

    Raises:
        ConfigError: a stage was made, or begun, with another configuration or from another input; every stage that
            would have to be trained again is named, with the command that clears them.
    """
    stale: dict[str, str] = {}
    todo = []
    for stage in stages:
        begun = is_complete(stage) or (stage.run_dir / "checkpoints").exists()
        reasons = _reasons(stage, stages, configs[stage.name], manifest, {other.name for other in todo}, stale)
        if begun and (reason := next(reasons, None)):
            stale[stage.name] = reason
        elif not is_complete(stage):
            todo.append(stage)
    if stale:
        folders = " ".join(str(stage.run_dir) for stage in stages if stage.name in stale)
        lines = [f"stage {name} is done or begun, but {reason}" for name, reason in stale.items()]
        raise ConfigError(
            "\n".join(lines)
            + f"\nTo keep what is there, start with another run_dir. To train them again: rm -r {folders}"
        )
    return todo


def _reasons(
    stage: Stage, stages: list[Stage], config: Any, manifest: Manifest, todo: set[str], stale: dict[str, str]
) -> Iterator[str]:
    path = stage.run_dir / run_directory.CONFIG_FILE
    if not path.exists():
        yield f"{path} is gone, so nobody can say with which configuration"
        return
    changes = differing_keys(path.read_text(encoding="utf-8"), config)
    if changes:
        yield f"its configuration changed: {'; '.join(changes[:5])}"
    for name in stage.depends_on:
        if name in stale:
            yield f"stage {name}, which it reads, has to be trained again"
        elif name in todo:
            yield f"stage {name}, which it reads, is not: it was made from an earlier one"
        else:
            source = next(other for other in stages if other.name == name)
            before = manifest[stage.name].inputs.get(name)
            now = output_identity(source)
            if before is not None and now is not None and before != now:
                yield f"the output of stage {name}, which it read, changed since"


def differing_keys(saved: str, config: Any) -> list[str]:
    """`key: old -> new` of the keys of a saved config.yaml that decide what a stage learns.

    What `config` leaves to a checkpoint that is gone by now counts as equal.
    """
    return [
        run_directory.describe(difference)
        for difference in run_directory.differences(saved, to_yaml(config))
        if not any(fnmatch.fnmatchcase(difference[0], pattern) for pattern in _FREE_KEYS)
        and difference[2] != MISSING
        and not (difference[0] == "data.tokenizer" and difference[2] is None)
    ]


def log_file(stage: Stage) -> Path:
    """What the stage said."""
    return stage.run_dir / "log.txt"
