"""README.md and docs/: what they name is there, what they show can be typed, nothing waits to be filled in."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nemo_align.config.compose import ConfigError, compose
from nemo_align.config.doctor import stage_of
from nemo_align.config.help import VERB_LINES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    path
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
    if path.exists()
]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# A path as prose and tables name it: `tests/...`; `<...>`, `*` and `{...}` stand for several.
NAMED = re.compile(r"(?<![\w/.<{$-])((?:tests|docs|conf|slurm|tools|nemo_align)/[\w./-]*[\w/])(?![\w*<{-])")
# A line of nothing but capitals, or a word in capitals that says what is to stand in its place.
PLACEHOLDER = re.compile(
    r"^[A-Z][A-Z_]{4,}$|\b(?:TODO|FIXME|TBD|[A-Z]+_(?:TABLE|MINUTES|SECONDS|ERROR(?:_\d+)?|RESULTS?))\b"
)
COMMAND = re.compile(r"^(?!error: )[^#\n]*?(?:nemo-align|slurm/train\.sbatch) (\S.*)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """What follows `nemo-align` in every command of the page's blocks, continued lines joined, comments cut off."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            if match := COMMAND.match(line):
                found.append(re.split(r"\s#", match[1])[0].strip())
    return found


def test_there_is_documentation():
    assert {"README.md", "docs/data.md", "docs/metrics.md", "docs/running.md"} <= {
        page.relative_to(ROOT).as_posix() for page in PAGES
    }
    assert len(commands(ROOT / "README.md")) >= 4


@each_page
def test_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


@each_page
def test_files_that_are_named_are_there(page):
    # Another project's file is named with the project.
    named = set(NAMED.findall(re.sub(r"Megatron-LM's `[^`]*`", "", page.read_text(encoding="utf-8"))))
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


@each_page
def test_nothing_waits_to_be_filled_in(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    left = [f"{number}: {line}" for number, line in enumerate(lines, start=1) if PLACEHOLDER.search(line)]
    assert left == []


@each_page
def test_commands_have_known_verbs(page):
    unknown = [text for text in commands(page) if text.split()[0] not in VERB_LINES and not text.startswith("-")]
    assert unknown == []


@each_page
def test_commands_have_known_keys(page):
    """Everything but files is checked: a shown command has no unknown key, group choice or experiment, and every value
    has its type. Not commands that show a refusal (the error stands below them), nor those with a blank in <...>."""
    text = page.read_text(encoding="utf-8")
    wrong = []
    for command in commands(page):
        shown_as_refused = re.search(
            rf"^\$ nemo-align {re.escape(command)}[^\n]*\n(?:error: |CLI_ERROR)", text, re.MULTILINE
        )
        verb, *arguments = shlex.split(command)
        if verb not in VERB_LINES or shown_as_refused or re.search(r"<|\.\.\.|\$", command):
            continue
        overrides = [argument for argument in arguments if not argument.startswith("-")]
        try:
            _ = stage_of(overrides) if verb == "doctor" else compose(verb, overrides, check_files=False)
        except ConfigError as error:
            said = str(error)
            # An excerpt may leave out what a whole command needs.
            if not re.search(r"is missing|no model|length of the stage", said):
                wrong.append(f"{command}: {said}")
    assert wrong == []
