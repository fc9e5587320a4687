"""Where each text comes from and under which licence. The manifest and the README say the same."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Source:
    """A package and what is taken from it."""

    package: str
    content: str
    licence: str
    used_for: str


SOURCES = {
    "wikipedia": Source(
        package="gensim",
        content="107 pages of the English Wikipedia, markup removed (gensim's test data)",
        licence="text: CC BY-SA 3.0 and GFDL, by Wikipedia's contributors; the package: LGPL-2.1",
        used_for="tokenizer, pretraining, continued pretraining",
    ),
    "chatterbot": Source(
        package="chatterbot-corpus",
        content="short question-and-answer dialogues written by hand, English and 27 other languages",
        licence="BSD-3-Clause",
        used_for="tokenizer, pretraining (other languages), continued pretraining (English questions), General SFT",
    ),
    "codeio": Source(
        package="reasoning-gym",
        content="3,241 task descriptions with Python code; 2,750 with five scores that a language model gave",
        licence="Apache-2.0",
        used_for="tokenizer, pretraining (code), Code SFT, General SFT (2 %), reward model, preference pairs",
    ),
    "procedural": Source(
        package="reasoning-gym",
        content="tasks made by seeded generators, each with a verifier that scores any answer",
        licence="Apache-2.0",
        used_for="continued pretraining (questions and answers), General SFT, preference pairs",
    ),
}


def describe() -> dict[str, dict[str, str]]:
    """The table with installed versions, for the manifest."""
    return {name: {**asdict(source), "version": version(source.package)} for name, source in SOURCES.items()}


def package_file(module: str, *parts: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"the package with module {module} is not installed: pip install 'nemo_align[quickstart]'")
    path = Path(spec.origin).parent.joinpath(*parts)
    if not path.exists():
        raise ValueError(f"{path} is missing: the installed version of {module} has no such data")
    return path
