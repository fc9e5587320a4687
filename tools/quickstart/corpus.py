"""Pretraining text by language and split, and the question-answer text of continued pretraining."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, islice

from quickstart.amounts import Amounts
from quickstart.code_tasks import CodeTask
from quickstart.dialogues import ENGLISH, Conversation
from quickstart.procedural_tasks import ProceduralTask
from quickstart.split import TRAIN, VALIDATION, digest, divide
from quickstart.wikipedia import pages

_TURNS_PER_DOCUMENT = 24  # of the short dialogues in other languages

Splits = dict[str, list[str]]  # documents by split


@dataclass(frozen=True)
class Corpus:
    """Documents of each kind, by split."""

    english: Splits
    multilingual: Splits
    code: Splits
    qa: Splits

    def tokenizer_texts(self, max_characters: int) -> Iterable[str]:
        """Paragraphs of the training parts: other languages whole, for they are few, then English and code in turn."""
        yield from _clip(self.multilingual[TRAIN], max_characters // 4)
        yield from _clip(self.qa[TRAIN], max_characters // 16)
        yield from _clip(self.code[TRAIN], max_characters // 4)
        yield from _clip(self.english[TRAIN], max_characters // 2)


def build_corpus(
    code: list[CodeTask], conversations: list[Conversation], tasks: list[ProceduralTask], amounts: Amounts
) -> Corpus:
    """All documents, in an order that depends on nothing but their text."""
    english = divide(sorted(islice(pages(), amounts.wikipedia_pages), key=lambda page: digest(page[0])))
    solutions = divide(
        (item.task, f"# {item.task}\n{item.code}") for item in sorted(code, key=lambda i: digest(i.task))
    )
    return Corpus(
        english=english, multilingual=_other_languages(conversations), code=solutions, qa=_qa(conversations, tasks)
    )


def _other_languages(conversations: list[Conversation]) -> Splits:
    """Dialogues of one category and language joined to documents; each dialogue is split by its first turn."""
    documents: Splits = {TRAIN: [], VALIDATION: []}
    foreign = [conversation for conversation in conversations if conversation.language != ENGLISH]
    for _, members in groupby(foreign, key=lambda conversation: (conversation.language, conversation.category)):
        parts = divide((conversation.prompt, "\n".join(conversation.turns)) for conversation in members)
        for split, texts in parts.items():
            documents[split] += [
                "\n\n".join(texts[i : i + _TURNS_PER_DOCUMENT]) for i in range(0, len(texts), _TURNS_PER_DOCUMENT)
            ]
    return {split: sorted(texts, key=digest) for split, texts in documents.items()}


def _qa(conversations: list[Conversation], tasks: list[ProceduralTask]) -> Splits:
    """Questions with their answers as plain text, a document each."""
    pairs = [(task.question, task.answer) for task in tasks]
    pairs += [(c.prompt, c.turns[1]) for c in conversations if c.language == ENGLISH]
    pairs.sort(key=lambda pair: (digest(pair[0]), pair[1]))
    return divide((question, f"Question: {question}\nAnswer: {answer}") for question, answer in pairs)


def _clip(texts: Iterable[str], max_characters: int) -> Iterable[str]:
    """Lines of the texts, with their newline and indentation, until there are that many characters."""
    for text in texts:
        for line in text.splitlines():
            if line.strip():
                max_characters -= len(line)
                yield line
        if max_characters <= 0:
            return
