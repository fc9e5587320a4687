"""Token ids, masks and order of the examples, derived again from the documented formats.

The chat format and its loss mask are those of the Nemotron-4 recipe; the order of rows is the seeded permutation that
nemo_align/data/sampler.py documents; the order of pretraining samples is that of Megatron-core's GPTDataset.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece


@dataclass(frozen=True)
class Sequence:
    """Tokens and whether each of them is to be predicted."""

    tokens: list[int]
    predicted: list[bool]


@dataclass(frozen=True)
class Example:
    """One example: a dialogue, a sample or window, a rated response, or the two responses of a pair."""

    sequences: list[Sequence]
    targets: dict[str, float] = field(default_factory=dict)  # labels or rewards; a missing label is absent
    ends_with_label: bool = False  # the last token is no input: it is only predicted

    @property
    def num_tokens(self) -> int:
        """Tokens that a model reads."""
        return sum(len(sequence.tokens) - self.ends_with_label for sequence in self.sequences)


class Chat:
    """The Nemotron chat format over a SentencePiece model with byte fallback.

    A model that puts a space before a text would do so at every piece of a dialogue. A line break never merges with
    what follows it, so a text behind one is tokenized as it stands in the middle of a dialogue.
    """

    def __init__(self, model_file: Path) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        self.line_break = self._model.encode("\n")[-1]
        self.system, self.turn, self.reward = (self._model.piece_to_id(f"<extra_id_{n}>") for n in range(3))
        self.end_of_document = self._model.eos_id()

    def text(self, text: str) -> list[int]:
        ids = self._model.encode("\n" + text)
        return ids[ids.index(self.line_break) + 1 :]

    def header(self, start: int, name: str) -> list[int]:
        return [start, *self.text(name), self.line_break]

    def body(self, text: str) -> list[int]:
        return [*self.text(text), self.line_break]

    def prompt(self, *user_texts: str) -> list[int]:
        """An empty system turn, the user's turn and the header of the answer."""
        tokens = self.header(self.system, "System") + self.body("")
        for text in user_texts:
            tokens += self.header(self.turn, "User") + self.body(text)
        return tokens + self.header(self.turn, "Assistant")

    def dialogue(self, messages: list[dict]) -> Sequence:
        """Learnt: the assistant's text, its line break and the token that ends the turn."""
        tokens = self.header(self.system, "System") + self.body("")
        predicted = [False] * len(tokens)
        answered = False
        for message in messages:
            assistant = message["role"] == "assistant"
            header = self.header(self.turn, "Assistant" if assistant else "User")
            body = self.body(message["content"])
            tokens += header + body
            predicted += [answered] + [False] * (len(header) - 1) + [assistant] * len(body)
            answered = assistant
        assert answered, "the test's dialogues end with the assistant"
        return Sequence([*tokens, self.turn], [*predicted, True])

    def answer(self, prompt: str, response: str) -> Sequence:
        begin = self.prompt(prompt)
        learnt = [*self.body(response), self.turn]
        return Sequence(begin + learnt, [False] * len(begin) + [True] * len(learnt))

    def rated(self, prompt: str, response: str) -> Sequence:
        tokens = [*self.prompt(prompt), *self.body(response), self.reward]
        return Sequence(tokens, [False] * len(tokens))


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def dialogues(chat: Chat, file: Path, longest: int) -> list[Example]:
    """Dialogues above `longest` tokens lose their oldest exchanges, as data.overlong=truncate has it."""
    examples = []
    for row in rows(file):
        messages = row["messages"]
        while len((dialogue := chat.dialogue(messages)).tokens) > longest:
            messages = messages[2:]
        examples.append(Example([dialogue]))
    return examples


def rated_responses(chat: Chat, file: Path, attributes: list[str]) -> list[Example]:
    return [
        Example(
            [chat.rated(row["prompt"], row["response"])],
            {name: float(row[name]) for name in attributes if row[name] is not None},
        )
        for row in rows(file)
    ]


def pairs(chat: Chat, file: Path) -> list[Example]:
    """Chosen, then rejected."""
    return [
        Example(
            [chat.answer(row["prompt"], row[side]) for side in ("chosen", "rejected")],
            {"gap": row["chosen_reward"] - row["rejected_reward"]},
        )
        for row in rows(file)
    ]


def order_of_rows(count: int, seed: int, needed: int) -> list[int]:
    """The first `needed` indices: each epoch sorts the rows by raw Philox numbers seeded with (seed, epoch)."""
    order: list[int] = []
    epoch = 0
    while len(order) < needed:
        keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count).tolist()
        order += sorted(range(count), key=lambda row: (keys[row], row))
        epoch += 1
    return order[:needed]


def documents(bin_file: Path, end_of_document: int) -> list[np.ndarray]:
    """The documents of a small `.bin` (16-bit ids), each with the end-of-document token that closes it."""
    stream = np.fromfile(bin_file, dtype=np.uint16).astype(np.int64)
    ends = np.flatnonzero(stream == end_of_document) + 1
    assert ends[-1] == len(stream)
    return np.split(stream, ends[:-1])


def pretraining_samples(texts: list[np.ndarray], count: int, length: int, seed: int) -> list[Example]:
    """`count` samples of `length` predicted tokens in GPTDataset's order.

    Documents are shuffled and laid end to end, cut every `length` tokens (samples share their border token), and the
    samples shuffled, both by one numpy RandomState. The last epoch is shuffled apart if less than 80 % of it is used.
    """
    per_epoch = sum(len(text) for text in texts)
    epochs = -(-(count * length + 1) // per_epoch)
    before_last = ((epochs - 1) * per_epoch - 1) // length
    apart = epochs > 1 and count - before_last < int(0.8 * ((per_epoch - 1) // length))
    chance = np.random.RandomState(seed)

    def shuffled(first: int, last: int, repeats: int = 1) -> np.ndarray:
        numbers = np.tile(np.arange(first, last, dtype=np.int32), repeats)
        chance.shuffle(numbers)
        return numbers

    runs = (epochs - 1, 1) if apart else (epochs,)
    stream = np.concatenate([texts[number] for run in runs for number in shuffled(0, len(texts), run)])
    total = (epochs * per_epoch - 1) // length
    cuts = (0, before_last, total) if apart else (0, total)
    order = np.concatenate([shuffled(first, last) for first, last in itertools.pairwise(cuts)])
    return [_window(stream[number * length : (number + 1) * length + 1]) for number in order[:count]]


def held_out_windows(texts: list[np.ndarray], length: int, end_of_document: int) -> list[Example]:
    """All tokens, each predicted once, behind one end-of-document token."""
    stream = np.concatenate([[end_of_document], *texts])
    return [_window(stream[start : start + length + 1]) for start in range(0, len(stream) - 1, length)]


def _window(tokens: np.ndarray) -> Example:
    return Example([Sequence(tokens.tolist(), [False] + [True] * (len(tokens) - 1))], ends_with_label=True)
