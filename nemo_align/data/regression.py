"""Rated responses for the multi-attribute reward model; the reward token `<extra_id_2>` ends each sequence."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_align.config.data import ChatDataConfig, RewardDataConfig, RowsConfig
from nemo_align.data.bad_rows import BadRows
from nemo_align.data.cache_key import cache_key, common_settings
from nemo_align.data.chat import Message, Rated, RowError
from nemo_align.data.chat_template import ChatTemplate
from nemo_align.data.overlong import check_policy, fit_turns, too_long
from nemo_align.data.preparation import converted_rows
from nemo_align.data.tokenized_rows import TokenizedRows, open_or_build
from nemo_align.data.tokenized_rows_writer import TokenizedRowsWriter
from nemo_align.data.tokenizer import Tokenizer

log = logging.getLogger("nemo_align")

MISSING = float("nan")


def tokenize_regression(
    config: RewardDataConfig,
    rows: Mapping[str, RowsConfig],
    tokenizer: Tokenizer,
    *,
    cache_dir: str | Path,
    seed: int,
    attributes: Sequence[str],
) -> TokenizedRows:
    """One sequence per rated response; target "labels" [N, len(attributes)], NaN where missing.

    Rows without any of the attributes are left out and counted (`dropped_unlabelled`). An attribute that no row has is
    warned of: its head stays random, as four of the nine slots of the published reward model are.
    """
    check_policy(config.overlong, config.sequence_length)
    if not attributes or len(set(attributes)) != len(attributes):
        raise ValueError(f"reward.attributes: {list(attributes)}; give each attribute once, at least one")
    template = ChatTemplate(tokenizer, config.default_system)
    settings = common_settings(config, rows, seed) | {"attributes": list(attributes)}
    key = cache_key("regression", rows, tokenizer.fingerprint, settings, Path(cache_dir))

    def build(writer: TokenizedRowsWriter) -> Mapping[str, int]:
        counts: Counter[str] = Counter(rows=0, kept=0, dropped_overlong=0, truncated=0, dropped_unlabelled=0)
        labelled = Counter(dict.fromkeys(attributes, 0))
        bad = BadRows(config.bad_rows, writer)
        for origin, found, reject in converted_rows(rows, ("rated",), counts, bad, seed=seed, attributes=attributes):
            of_row: Counter[str] = Counter()  # a row is kept or rejected whole, with all its labelled turns
            examples = []
            try:
                for rated in found:
                    assert isinstance(rated, Rated)
                    scores = [rated.scores[name] for name in attributes]
                    if all(score is None for score in scores):
                        of_row["dropped_unlabelled"] += 1
                        continue
                    tokens = rated_tokens(rated.messages, template, config, of_row)
                    if tokens is not None:
                        examples.append((tokens, scores))
            except RowError as error:
                reject(error)
                continue
            counts.update(of_row)
            for tokens, scores in examples:
                labels = [MISSING if score is None else score for score in scores]
                writer.add([(tokens, [False] * len(tokens))], origin=origin, targets={"labels": labels})
                labelled.update(name for name, score in zip(attributes, scores, strict=True) if score is not None)
                counts["kept"] += 1
        without = [name for name, number in labelled.items() if number == 0]
        if without:
            log.warning("%s: no row has a value for %s, so nothing trains it", ", ".join(rows), ", ".join(without))
        return dict(counts) | bad.counts() | {f"labels_{name}": number for name, number in labelled.items()}

    return open_or_build(
        Path(cache_dir),
        kind="regression",
        fingerprint=key,
        segments=1,
        build=build,
        sources=list(rows),
        targets={"labels": len(attributes)},
        attributes=attributes,
    )


def rated_tokens(
    messages: Sequence[Message], template: ChatTemplate, config: ChatDataConfig, counts: Counter[str]
) -> list[int] | None:
    """Tokens up to the reward token, without older turns if they must go; None if dropped.

    A response is never cut: its score is of the whole. Counts `truncated` and `dropped_overlong`.
    """
    turns = template.turns(messages)
    tokens, _ = template.rated(turns)
    if len(tokens) <= config.sequence_length:
        return tokens
    if config.overlong == "drop":
        counts["dropped_overlong"] += 1
        return None
    if config.overlong == "error":
        raise too_long(len(tokens), config.sequence_length, truncated=False)
    reward_token = 1
    shorter = fit_turns(
        turns, limit=config.sequence_length, keep=2, length=lambda some: sum(map(len, some)) + reward_token
    )
    if shorter is None:
        raise too_long(len(tokens), config.sequence_length, truncated=True)
    counts["truncated"] += 1
    return template.rated(shorter)[0]
