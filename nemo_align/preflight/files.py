"""Files that a stage, or the stages of a recipe, read and this node does not have. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_align.config import planned_model
from nemo_align.config.stages import WorkerConfig
from nemo_align.config.validation_data import NamedFile, missing_files, say_missing


@dataclass(frozen=True)
class Missing:
    """A file or folder, and what to do about it."""

    text: str
    remedy: str


def missing(stages: Mapping[str, WorkerConfig], written: Mapping[str, Sequence[Path]] | None = None) -> list[Missing]:
    """What is not here, each once, with the stages that read it.

    `written`: of a recipe, the folders that each stage finds written by those before it; None for a stage alone.
    """
    readers: dict[str, list[tuple[str, NamedFile]]] = {}
    for name, config in stages.items():
        lacking = list(missing_files(config))
        init_from = config.checkpoint.init_from
        if init_from is not None and not Path(init_from).exists():
            lacking.append(NamedFile("checkpoint.init_from", init_from, init_from))
        before = (written or {}).get(name, ())
        for file in lacking:
            if not any(Path(file.path).is_relative_to(folder) for folder in before):
                readers.setdefault(file.path, []).append((name, file))
    found = []
    for (name, file), *others in readers.values():
        text = say_missing(file)
        if written is not None:
            too = ", ".join(dict.fromkeys(other for other, _ in others if other != name))
            text = f"stage {name}: {text}" + (f" (read by {too} too)" if too else "")
        found.append(Missing(text, _remedy(file, stages[name], None if written is None else name)))
    return found


def _remedy(file: NamedFile, config: WorkerConfig, stage: str | None) -> str:
    """`stage`: of a recipe, where a key of one stage is set among its overrides."""

    def other(what: str) -> str:
        return f"{file.key}={what}" if stage is None else f"'stages.{stage}.overrides=[\"{file.key}={what}\"]'"

    makes = ""
    if (writer := planned_model.stage_that_writes(file.path)) is not None:
        makes = f"stage {writer[1]} of {writer[0]} makes it: nemo-align pipeline +experiment={writer[0]}. Or "
    if file.key == "checkpoint.init_from":
        which = "a run directory, whose newest checkpoint is taken, a checkpoint, or a Hugging Face folder"
        earlier = "" if stage is None else f"; stages.{stage}.init_from=<earlier stage> takes that one's"
        return f"{makes}name {which}: {other('<folder>')}{earlier}"
    if Path(file.path).is_relative_to(config.data.root):
        return "put it there, or name a folder that all nodes see: data.root=<folder>"
    return f"{makes or 'put it there, or '}name another that all nodes see: {other('<path>')}"
