"""Where YAML comes from: the folder conf/, the user's own folders, the choices of each group, the line of a key."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# Folders of the user's own YAML, separated as in PATH. `--config-dir` sets it, so that started commands inherit it.
CONFIG_DIRS_VARIABLE = "NEMO_ALIGN_CONFIG_DIR"
EXPERIMENT = "experiment"
_COMMAND = re.compile(r"nemo-align\s+([a-z]+)\s")


def conf_dir() -> Path:
    """The folder of the root files: inside the installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def user_dirs() -> list[Path]:
    """Folders given by `--config-dir` or NEMO_ALIGN_CONFIG_DIR."""
    return [Path(folder) for folder in os.environ.get(CONFIG_DIRS_VARIABLE, "").split(os.pathsep) if folder]


def search_dirs() -> list[Path]:
    """All folders of YAML, in the order in which they are searched."""
    return [conf_dir(), *user_dirs()]


def groups() -> list[str]:
    """Names of the groups, `experiment` among them."""
    found = {path.name for folder in search_dirs() if folder.is_dir() for path in folder.iterdir() if path.is_dir()}
    return sorted(found)


def choices(group: str) -> list[str]:
    """Choices of a group: file names without .yaml, with folders below it in front (`quickstart/code_sft`)."""
    found = {
        path.relative_to(folder / group).with_suffix("").as_posix()
        for folder in search_dirs()
        for path in (folder / group).rglob("*.yaml")
    }
    return sorted(found)


def verbs_of_experiment(name: str) -> set[str]:
    """Verbs whose commands the first comments of an experiment show; none if there is no such experiment."""
    return set(_COMMAND.findall("\n".join(_head_comments(_file(EXPERIMENT, name))) + "\n"))


def experiments(verb: str) -> list[tuple[str, str]]:
    """Experiments of a verb with the first comment of each: those whose comments show `nemo-align <verb> ...`, or
    show no command at all."""
    found = []
    for name in choices(EXPERIMENT):
        comments, verbs = _head_comments(_file(EXPERIMENT, name)), verbs_of_experiment(name)
        if verb in verbs or not verbs:
            lines = [
                line for line in comments if line and not line.startswith("@package") and not _COMMAND.search(line)
            ]
            found.append((name, lines[0] if lines else ""))
    return found


def description(group: str, choice: str) -> str:
    """The first comment of a group's file."""
    lines = [line for line in _head_comments(_file(group, choice)) if line and not line.startswith("@package")]
    return lines[0] if lines else ""


def place_of(key: str, files: Iterable[tuple[str, str]]) -> str | None:
    """`file:line` of a dotted key. `files` are (path below a search folder without .yaml, package), as Hydra merged
    them; the last one that holds the key set it."""
    place = None
    for config_path, package in files:
        path = _file("", config_path)
        if path is None:
            continue
        prefix = f"{package}." if package else ""
        if key.startswith(prefix) and (line := _line_of(path, key.removeprefix(prefix))):
            place = f"{path}:{line}"
    return place


def hydra_place(config_path: str, package: str) -> str | None:
    """`file:line` where a merged file sets Hydra's own configuration; None if it does not, or is Hydra's own."""
    path = _file("", config_path)
    if path is None:
        return None
    if package == "hydra" or package.startswith("hydra."):
        return f"{path}:1"
    import yaml

    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        if str(key.value) == "hydra" or str(key.value).startswith("hydra."):
            return f"{path}:{key.start_mark.line + 1}"
    return None


def _file(group: str, choice: str) -> Path | None:
    return next((p for folder in search_dirs() if (p := folder / group / f"{choice}.yaml").is_file()), None)


def _head_comments(path: Path | None) -> list[str]:
    comments: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path else ():
        if line.strip() and not line.startswith("#"):
            break
        comments.append(line.lstrip("#").strip())
    return comments


def _line_of(path: Path, key: str) -> int | None:
    import yaml

    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    return _line_in(node, re.sub(r"\[(\d+)\]", r".\1", key).split("."))


def _line_in(node: object, names: Sequence[str]) -> int | None:
    import yaml

    if isinstance(node, yaml.MappingNode):
        for child, value in node.value:
            parts = str(child.value).split(".")
            if parts == list(names):
                return child.start_mark.line + 1
            if parts == list(names[: len(parts)]) and (line := _line_in(value, names[len(parts) :])):
                return line
    elif isinstance(node, yaml.SequenceNode) and names[0].isdigit() and int(names[0]) < len(node.value):
        child = node.value[int(names[0])]
        return child.start_mark.line + 1 if len(names) == 1 else _line_in(child, names[1:])
    return None
