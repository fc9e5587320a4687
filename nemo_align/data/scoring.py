"""Rows that a reward model scores, and the rows with their rewards written back.

A pair gives two sequences (chosen, rejected), a dialogue one (its last response). Rewards are written with every digit:
rpo trains on their differences.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from nemo_align.config.data import RowsConfig, ScoreDataConfig
from nemo_align.data.bad_rows import BadRows
from nemo_align.data.cache_key import cache_key, common_settings
from nemo_align.data.chat import Dialogue, Message, Pair, Rated, RowError, check_rated
from nemo_align.data.chat_template import ChatTemplate
from nemo_align.data.overlong import check_policy
from nemo_align.data.preparation import converted_rows
from nemo_align.data.regression import rated_tokens
from nemo_align.data.rows import read_rows
from nemo_align.data.tokenized_rows import TokenizedRows, open_or_build, rejected_path
from nemo_align.data.tokenized_rows_writer import TokenizedRowsWriter
from nemo_align.data.tokenizer import Tokenizer

log = logging.getLogger("nemo_align")


def tokenize_scoring(
    config: ScoreDataConfig, rows: RowsConfig, tokenizer: Tokenizer, *, cache_dir: str | Path, seed: int
) -> TokenizedRows:
    """One example per response; the examples of a row follow one another and share `origins[i, 1]`, the row number.

    `report["responses_per_row"]` is 2 for pairs, 1 for dialogues. A row is dropped whole (`overlong=drop`).
    """
    check_policy(config.overlong, config.sequence_length)
    template = ChatTemplate(tokenizer, config.default_system)
    sources = {"rows": rows}
    key = cache_key("score", sources, tokenizer.fingerprint, common_settings(config, sources, seed), Path(cache_dir))

    def build(writer: TokenizedRowsWriter) -> Mapping[str, int]:
        counts: Counter[str] = Counter(rows=0, kept=0, dropped_overlong=0, truncated=0, responses_per_row=0)
        bad = BadRows(config.bad_rows, writer)
        for origin, (item,), reject in converted_rows(sources, ("pair", "dialogue"), counts, bad, seed=seed):
            of_row: Counter[str] = Counter()
            try:
                responses = _rated_dialogues(item)
                sequences = _sequences(responses, template, config, of_row)
            except RowError as error:
                reject(error)
                continue
            counts.update(of_row)
            counts["responses_per_row"] = len(responses)
            for tokens in sequences:
                writer.add([(tokens, [False] * len(tokens))], origin=origin)
            counts["kept"] += bool(sequences)
        return counts | bad.counts()

    return open_or_build(
        Path(cache_dir), kind="score", fingerprint=key, segments=1, build=build, sources=[Path(rows.path).name]
    )


def write_scored_rows(
    target: Path,
    source: RowsConfig,
    scored: TokenizedRows,
    scores: np.ndarray,
    *,
    attributes: Sequence[str],
    weights: Mapping[str, float],
    seed: int,
) -> int:
    """Write the scored rows of `source` as JSON Lines, whole or not at all; returns how many. Rows that were set aside
    as wrong go to `<target's stem>.rejected.jsonl` with the reasons.

    `scores` [N, A] are those of the examples of `scored`, one column per attribute. A pair row gets `chosen_reward`,
    `rejected_reward` (weighted sums), `chosen_scores` and `rejected_scores` ({attribute: score}); a dialogue row gets
    `reward` and `scores`. `seed` is the one the rows were tokenized with. Raises ValueError for a disk that cannot be
    written, a score that is not finite, and rows that changed meanwhile.
    """
    if set(weights) != set(attributes):
        raise ValueError(f"weights: {sorted(weights)}; give one for each attribute: {', '.join(attributes)}")
    values = np.asarray(scores, dtype=np.float64)
    assert values.shape == (len(scored), len(attributes)), (values.shape, len(scored), attributes)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{source.path}: row {int(scored.origins[bad[0], 1])}: the reward model gave a score that is not finite"
        )
    per_row = scored.report["responses_per_row"]
    row_numbers = scored.origins[::per_row, 1]
    names = ("chosen", "rejected") if per_row == 2 else ("",)
    writing = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    position = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with writing.open("w", encoding="utf-8", newline="\n") as file:
            for row in read_rows(source, seed=seed, with_unreadable=True):
                if position == len(row_numbers) or row.number != row_numbers[position]:
                    continue  # dropped as over-long, or set aside
                record: dict[str, Any] = dict(row.record)
                for response, name in enumerate(names):
                    record |= _rewards(name, values[position * per_row + response], attributes, weights)
                file.write(_line(record, row.where))
                position += 1
            file.flush()
            os.fsync(file.fileno())
        if position != len(row_numbers):
            raise ValueError(
                f"{source.path}: changed while it was scored ({position} of {len(row_numbers)} rows found); score again"
            )
        os.replace(writing, target)
        _publish_rejected(target, scored)
    except OSError as error:
        raise ValueError(
            f"{target} cannot be written ({error}); make room there and start the same command again: the scores are "
            "kept"
        ) from error
    finally:
        with suppress(OSError):
            writing.unlink(missing_ok=True)
    return position


def _publish_rejected(target: Path, scored: TokenizedRows) -> None:
    """Beside the scored rows, those that `data.bad_rows=quarantine` left out of them: no row goes without a trace."""
    beside = target.with_name(f"{target.stem}.rejected.jsonl")
    if not scored.report.get("quarantined"):
        beside.unlink(missing_ok=True)  # of an earlier attempt with other rows
        return
    try:
        shutil.copyfile(rejected_path(scored.folder), beside)
    except FileNotFoundError:
        log.warning("%s is gone, so the rows that %s lacks are not listed", rejected_path(scored.folder), target)
        return
    log.warning("%s lacks %s wrong rows: see %s", target, f"{scored.report['quarantined']:,}", beside)


def _line(record: dict[str, Any], where: str) -> str:
    """The row as one line. Columns that no format reads may hold anything; none may end the run after its scoring."""
    try:
        line = json.dumps(record, ensure_ascii=False, default=str) + "\n"
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply to be written; flatten its columns") from None
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # half a character in some other column: spelt as the escape that it was read from
        return json.dumps(record, default=str) + "\n"
    return line


def _rewards(name: str, scores: np.ndarray, attributes: Sequence[str], weights: Mapping[str, float]) -> dict[str, Any]:
    named = {attribute: float(score) for attribute, score in zip(attributes, scores, strict=True)}
    reward = sum(weights[attribute] * score for attribute, score in named.items())
    prefix = f"{name}_" if name else ""
    return {f"{prefix}reward": reward, f"{prefix}scores": named}


def _sequences(
    responses: list[Sequence[Message]], template: ChatTemplate, config: ScoreDataConfig, counts: Counter[str]
) -> list[list[int]]:
    """Tokens of each response of a row; none if one of them is dropped, as half a pair is of no use."""
    sequences = []
    for messages in responses:
        tokens = rated_tokens(messages, template, config, counts)
        if tokens is None:
            return []
        sequences.append(tokens)
    return sequences


def _rated_dialogues(item: Dialogue | Pair | Rated) -> list[Sequence[Message]]:
    if isinstance(item, Pair):
        return [(*item.messages, Message("assistant", text)) for text in (item.chosen, item.rejected)]
    assert isinstance(item, Dialogue)
    return [check_rated(Rated(item.messages, {}), "messages").messages]
