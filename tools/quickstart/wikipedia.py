"""English Wikipedia pages from gensim's test data, as plain text."""

from __future__ import annotations

import bz2
import re
from collections.abc import Iterator

from quickstart.sources import package_file

_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_ENTITIES = {"&nbsp;": " ", "&ndash;": "-", "&mdash;": "-", "&minus;": "-", "&thinsp;": " "}
_HEADING = re.compile(r"^=+\s*(.*?)\s*=+\s*$")
_END_SECTIONS = {
    "see also",
    "references",
    "external links",
    "further reading",
    "notes",
    "bibliography",
    "sources",
    "footnotes",
}
_MIN_PAGE_CHARACTERS = 500  # shorter: disambiguation pages


def pages() -> Iterator[tuple[str, str]]:
    """(title, text) of each article: paragraphs and headings, one line each. gensim removes the markup."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    with bz2.open(package_file("gensim", "test", "test_data", _DUMP)) as dump:
        for title, markup, _ in extract_pages(dump, filter_namespaces=("0",)):
            text = clean(filter_wiki(markup, promote_remaining=True, simplify_links=True))
            if len(text) >= _MIN_PAGE_CHARACTERS:
                yield title, f"{title}\n{text}"


def clean(text: str) -> str:
    """What the markup filter leaves over, tidied: quotes of bold text, bullets, captions, the lists at the end."""
    for entity, character in _ENTITIES.items():
        text = text.replace(entity, character)
    lines: list[str] = []
    for raw in text.replace("'''", "").replace("''", "").splitlines():
        line = " ".join(raw.split())
        if heading := _HEADING.match(line):
            if heading.group(1).casefold() in _END_SECTIONS:
                break
            while lines and lines[-1].startswith("\n"):  # a heading over nothing
                lines.pop()
            lines.append(f"\n{heading.group(1)}")
        elif _is_prose(line):
            lines.append(line)
    while lines and lines[-1].startswith("\n"):
        lines.pop()
    return "\n".join(lines).strip()


def _is_prose(line: str) -> bool:
    """A sentence, not a caption, a table cell or an item of a list."""
    return len(line) >= 60 and line[0] not in "*#:;|!{}" and line.rstrip("\"')").endswith((".", "?", "!", ":"))
