"""Tasks from reasoning-gym's seeded generators, with right and wrong answers, both scored by the task's verifier."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quickstart.split import normalise

# Tasks with short questions and answers, with what makes them short enough for sequences of a few hundred tokens.
GENERATORS: dict[str, dict[str, Any]] = {
    "aiw": {},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "caesar_cipher": {"max_words": 6},
    "calendar_arithmetic": {},
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "count_primes": {"max_n": 200},
    "family_relationships": {},
    "fraction_simplification": {"max_value": 100},
    "gcd": {"max_value": 100},
    "lcm": {"max_value": 30},
    "leg_counting": {"max_animals": 4},
    "letter_counting": {"max_words": 8},
    "number_filtering": {"max_numbers": 6},
    "number_sequence": {},
    "prime_factorization": {"max_value": 200},
    "sentence_reordering": {"max_words_in_sentence": 10},
    "simple_equations": {"max_value": 30},
    "spell_backward": {"max_word_len": 8},
    "syllogism": {},
    "time_intervals": {},
    "word_sequence_reversal": {"max_words": 6},
    "word_sorting": {"min_words": 3, "max_words": 6},
}
_MAX_QUESTION_CHARACTERS, _MAX_ANSWER_CHARACTERS = 450, 120
_OPPOSITES = {"Yes": "No", "No": "Yes", "True": "False", "False": "True"}
_OVERSAMPLING = 3  # generators repeat themselves and some items are too long


@dataclass(frozen=True)
class Attempt:
    """A wrong answer, what kind of mistake it is, and the verifier's score of it."""

    answer: str
    mistake: str
    reward: float


@dataclass(frozen=True)
class ProceduralTask:
    """A question with its right answer (the verifier's score of it is `reward`) and a wrong one."""

    generator: str
    question: str
    answer: str
    reward: float
    wrong: Attempt


def procedural_tasks(num_per_generator: int, seed: int) -> Iterator[ProceduralTask]:
    """At most that many different tasks of each generator; the generators take turns, so any start of them is mixed."""
    import reasoning_gym  # a second, for sympy

    streams = []
    for name, options in GENERATORS.items():
        size = num_per_generator * _OVERSAMPLING
        dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
        streams.append(_tasks(name, dataset, num_per_generator, random.Random(f"{seed} {name}")))
    while streams:
        alive = []
        for stream in streams:
            task = next(stream, None)
            if task is not None:
                alive.append(stream)
                yield task
        streams = alive


def _tasks(name: str, dataset: Any, limit: int, rng: random.Random) -> Iterator[ProceduralTask]:
    seen: set[str] = set()
    others: list[str] = []  # answers to earlier tasks of this generator
    for entry in dataset:
        question, answer = _tidy(entry["question"]), str(entry["answer"]).strip()
        key = normalise(question)
        if key in seen or len(question) > _MAX_QUESTION_CHARACTERS or not 0 < len(answer) <= _MAX_ANSWER_CHARACTERS:
            continue
        seen.add(key)
        reward = float(dataset.score_answer(answer, entry))
        wrong = _wrong_answer(dataset, entry, question, answer, reward, others, rng)
        others.append(answer)
        if wrong is not None:
            yield ProceduralTask(name, question, answer, reward, wrong)
            limit -= 1
        if not limit:
            return


def _wrong_answer(
    dataset: Any, entry: dict, question: str, answer: str, reward: float, others: list[str], rng: random.Random
) -> Attempt | None:
    """The first of a few mistakes, in random order, that the verifier scores below the right answer."""
    mistakes = {
        "slip": _slip(answer, rng),
        "other task": rng.choice(others) if others else None,
        "unfinished": _unfinished(answer),
        "echo": question.splitlines()[-1],
    }
    for mistake in rng.sample(sorted(mistakes), len(mistakes)):
        attempt = mistakes[mistake]
        if not attempt or attempt.casefold() == answer.casefold() or len(attempt) > _MAX_ANSWER_CHARACTERS:
            continue
        try:
            score = float(dataset.score_answer(attempt, entry))
        except ValueError:  # a few verifiers read the answer as numbers without a check: no score, no pair
            continue
        if score < reward:
            return Attempt(attempt, mistake, score)
    return None


def _slip(answer: str, rng: random.Random) -> str:
    """A near miss: yes for no, a number that is a little off, two neighbours swapped."""
    if answer in _OPPOSITES:
        return _OPPOSITES[answer]
    numbers = list(re.finditer(r"\d+", answer))
    if numbers:
        number = rng.choice(numbers)
        value = max(0, int(number.group()) + rng.choice((-10, -2, -1, 1, 2, 10)))
        return answer[: number.start()] + str(value).zfill(len(number.group())) + answer[number.end() :]
    separator = next((mark for mark in (", ", " ") if mark in answer), "")
    parts = answer.split(separator) if separator else list(answer)
    if len(parts) < 2:
        return answer
    at = rng.randrange(len(parts) - 1)
    parts[at], parts[at + 1] = parts[at + 1], parts[at]
    return separator.join(parts)


def _unfinished(answer: str) -> str:
    """The first half of the words, or of the letters of a single word."""
    words = answer.split(" ")
    return " ".join(words[: (len(words) + 1) // 2]) if len(words) > 1 else answer[: len(answer) // 2]


def _tidy(question: str) -> str:
    return "\n".join(line.rstrip() for line in question.strip().splitlines())
