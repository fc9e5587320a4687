"""The model of a checkpoint that is still to be written: that of the stage which will write it.

`checkpoint.init_from: runs/quickstart/recipe/code_sft` is the folder of stage `code_sft` of the recipe
`quickstart/recipe`; that stage's experiment names a model, or starts from an earlier stage that does. Only YAML of
conf/ and of the user's own folders is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_align.config import sources
from nemo_align.config.model import ModelConfig
from nemo_align.config.model_file import read_model


def sizes_of(init_from: str) -> ModelConfig | None:
    """Sizes of the model that `init_from` will hold; None if no experiment is known to write there."""
    seen: set[str] = set()
    while init_from not in seen:
        seen.add(init_from)
        name = init_from.removeprefix("runs/").rstrip("/")
        recipe, _, stage_name = name.rpartition("/")
        stage = _stage(recipe, stage_name)
        experiment = name if stage is None else stage.get("experiment")
        tree = _experiment(experiment)
        if tree is None:
            return None
        if (model := _model(tree)) is not None:
            return read_model(model)
        if stage is not None and stage.get("init_from") is not None:
            init_from = f"runs/{recipe}/{stage['init_from']}"
        else:
            init_from = str((tree.get("checkpoint") or {}).get("init_from"))
    return None


def stage_that_writes(path: str) -> tuple[str, str] | None:
    """(recipe, stage) whose folder by default, `runs/<recipe>/<stage>`, is `path` or holds it; None without one."""
    parts = Path(path).parts
    for depth in range(3, len(parts) + 1):
        recipe, name = "/".join(parts[1 : depth - 1]), parts[depth - 1]
        if parts[0] == "runs" and _stage(recipe, name) is not None:
            return recipe, name
    return None


def _experiment(name: Any) -> dict[str, Any] | None:
    import yaml

    if not isinstance(name, str) or name not in sources.choices(sources.EXPERIMENT):
        return None
    folders = (folder / sources.EXPERIMENT / f"{name}.yaml" for folder in sources.search_dirs())
    path = next(path for path in folders if path.is_file())
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    return tree if isinstance(tree, dict) else None


def _stage(recipe: str, name: str) -> dict[str, Any] | None:
    """A stage of a pipeline's experiment; the recipes that it builds on are looked through too."""
    tree = _experiment(recipe)
    if tree is None:
        return None
    based_on = [entry for entry in tree.get("defaults") or [] if isinstance(entry, str) and entry != "_self_"]
    for base in based_on:
        if Path(base).as_posix() != recipe and (found := _stage(base, name)) is not None:
            return found
    stage = (tree.get("stages") or {}).get(name)
    return stage if isinstance(stage, dict) and "experiment" in stage else None


def _model(tree: dict[str, Any]) -> str | None:
    for entry in tree.get("defaults") or []:
        if isinstance(entry, dict):
            for key, value in entry.items():
                if str(key).removeprefix("override ").strip("/ ") == "model" and isinstance(value, str):
                    return value
    return None
