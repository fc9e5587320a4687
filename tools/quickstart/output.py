"""Files of the output folder, and what the manifest says of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from nemo_align.data.indexed import write_indexed_dataset
from nemo_align.data.tokenizer import Tokenizer
from quickstart.split import TRAIN, VALIDATION, divide

# Turn markers and names around one exchange in the chat template, rounded up.
TEMPLATE_TOKENS = 20

Row = dict[str, Any]


class Output:
    """Writes documents and rows below a folder and keeps count of what it wrote and left out."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.counts: dict[str, dict[str, int]] = {}
        self._lengths: dict[str, int] = {}  # the same task and code stand in several files

    def num_tokens(self, text: str) -> int:
        """Tokens of a text."""
        if text not in self._lengths:
            self._lengths[text] = len(self.tokenizer.encode_text(text))
        return self._lengths[text]

    def documents(
        self, name: str, texts: Iterable[str], max_tokens: int, max_document_tokens: int | None = None
    ) -> None:
        """`<name>.bin` and `.idx`: texts in order until there are `max_tokens`; the last is cut there."""
        kept: list[list[int]] = []
        total = 0
        for text in texts:
            ids = self.tokenizer.encode_text(text)[:max_document_tokens][: max_tokens - total]
            if not ids:
                break
            kept.append(ids)
            total += len(ids)
        prefix = self.folder / name
        write_indexed_dataset(prefix, kept, self.tokenizer.vocab_size, self.tokenizer.eod)
        self.counts[name] = {"documents": len(kept), "tokens": total + len(kept)}

    def rows(
        self,
        name: str,
        rows: Iterable[tuple[str, Row]],
        *,
        limits: dict[str, int],
        fits: Callable[[Row], bool],
    ) -> dict[str, list[tuple[str, Row]]]:
        """`<name>train.jsonl` and `<name>validation.jsonl` from (task, row), the first of each split that fit.

        Returns what was written, with the tasks."""
        written = {}
        for split, members in divide((task, (task, row)) for task, row in rows).items():
            fitting = [member for member in members if fits(member[1])]
            kept = fitting[: limits[split]]
            written[split] = kept
            path = self.folder / f"{name}{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for _, row in kept)
            path.write_text("".join(lines), encoding="utf-8")
            self.counts[f"{name}{split}"] = {
                "rows": len(kept),
                "tokens": sum(self.row_tokens(row) for _, row in kept),
                "too_long": len(members) - len(fitting),
                "beyond_limit": len(fitting) - len(kept),
            }
        return written

    def row_tokens(self, row: Row) -> int:
        """Tokens of a row in the chat template, both responses of a pair counted with the prompt; an upper bound."""
        if "messages" in row:
            return TEMPLATE_TOKENS + sum(self.num_tokens(turn["content"]) + 6 for turn in row["messages"])
        responses = [row[key] for key in ("response", "chosen", "rejected") if key in row]
        return sum(TEMPLATE_TOKENS + self.num_tokens(row["prompt"]) + self.num_tokens(text) for text in responses)


def limits(train: int, validation: int) -> dict[str, int]:
    """Most rows of each split."""
    return {TRAIN: train, VALIDATION: validation}


def spread(first: Sequence[Any], *others: Sequence[Any]) -> list[Any]:
    """All members in one order in which each sequence is spread evenly: any start of it has the same mixture."""
    placed = []
    for number, sequence in enumerate((first, *others)):
        placed += [((index + 0.5) / len(sequence), number, member) for index, member in enumerate(sequence)]
    return [member for _, _, member in sorted(placed, key=lambda entry: entry[:2])]
