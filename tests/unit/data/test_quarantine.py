"""`data.bad_rows=quarantine`: what is left out, where it is written, and what it changes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_align.config.data import RowsConfig, SftDataConfig
from nemo_align.data.row_formats.table import find_format
from nemo_align.data.scoring import write_scored_rows
from nemo_align.data.sft import tokenize_sft
from nemo_align.data.tokenized_rows import rejected_path
from nemo_align.data.tokenizer import Tokenizer
from tests.unit.data.bad_rows_corpus import LABELS, VALID, chat, sharegpt
from tests.unit.data.test_bad_rows import rejects, tokenize

GOOD = {"messages": chat("q", "a")}


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_counts_reasons_and_the_file_are_named(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    empty = {"messages": chat("q", "")}
    odd_role = {"messages": [*chat("q", "a"), {"role": "tool", "content": "x"}]}
    path = write(tmp_path / "rows.jsonl", "{", empty, GOOD, odd_role, odd_role, {"prompt": "q", "response": "a"}, "[]")
    with caplog.at_level(logging.INFO, "nemo_align"):
        rows = tokenize("dialogue", path, tokenizer, bad_rows="quarantine")
    file = rejected_path(rows.folder)
    assert file.parent == rows.folder.parent and file.name == f"{rows.folder.name}.rejected.jsonl"
    assert rows.report == {
        "rows": 7, "kept": 1, "dropped_overlong": 0, "truncated": 0, "quarantined": 6,
        "quarantined_by_reason": {
            "messages[].role": 2, "not valid JSON": 1, "messages": 2, "not an object": 1,
        },
    }  # fmt: skip
    assert list(rejects(rows)) == [1, 2, 4, 5, 6, 7]
    assert rejects(rows)[2] == {
        "source": "mine", "file": str(path), "line": 2, "row": 2, "field": "messages",
        "message": "messages: turn 2 is an empty response; remove the turn or the row", "raw": json.dumps(empty),
    }  # fmt: skip
    assert "mine: 1 examples (rows 7, kept 1, quarantined 6)" in caplog.text
    assert "6 of 7 rows are left out as wrong" in caplog.text and str(file) in caplog.text
    caplog.clear()
    tokenize("dialogue", path, tokenizer, bad_rows="quarantine")  # from the cache: said again
    assert "6 of 7 rows are left out as wrong" in caplog.text


def test_rows_refused_by_later_rules_are_set_aside_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Over-long under data.overlong=error, and rewards against the order under data.select.inverted=error."""
    long = {"messages": chat("q " * 500, "a")}
    rows = tokenize(
        "dialogue", write(tmp_path / "rows.jsonl", long, GOOD), tokenizer,
        bad_rows="quarantine", overlong="error", sequence_length=100,
    )  # fmt: skip
    assert rows.report["quarantined_by_reason"] == {"length": 1} and rejects(rows)[1]["field"] == "length"
    turns = sharegpt("q", "a", "q " * 500, "a")
    turns[1]["label"] = turns[3]["label"] = "helpfulness:4"
    path = write(tmp_path / "rated.jsonl", {"conversations": turns}, {"conversations": turns[:2]})
    rated = tokenize("rated", path, tokenizer, bad_rows="quarantine", sequence_length=100)
    assert (rated.report["kept"], rated.report["quarantined"]) == (1, 1), "a row is kept or set aside whole"
    assert rated.origins.tolist() == [[0, 2]]


def test_a_file_without_a_good_row_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Of several files too: that one of them is wrong throughout is a mistake, not some bad rows."""
    good, bad = write(tmp_path / "good.jsonl", GOOD), write(tmp_path / "bad.jsonl", "{", {"a": 1}, "[]")
    config = SftDataConfig(sequence_length=64, bad_rows="quarantine")
    sources = {"good": RowsConfig(path=str(good)), "bad": RowsConfig(path=str(bad))}
    cache = tmp_path / "cache"
    with pytest.raises(
        ValueError, match=r"bad\.jsonl: all 3 rows of bad are rejected \(see .*\); the first: .*:1: not"
    ):
        tokenize_sft(config, sources, tokenizer, cache_dir=cache, seed=0)
    (file,) = cache.glob("*.rejected.jsonl")
    assert len(file.read_text().splitlines()) == 3 and not list(cache.glob("*/meta.json"))
    sources = {"good": RowsConfig(path=str(good), format="chat")}
    with pytest.raises(ValueError, match="unknown format 'chat' here"):
        tokenize_sft(config, sources, tokenizer, cache_dir=cache, seed=0)


def test_the_policy_is_part_of_the_key(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD)
    kept, strict = (tokenize("dialogue", path, tokenizer, bad_rows=policy) for policy in ("quarantine", "error"))
    assert kept.fingerprint != strict.fingerprint and "quarantined" not in kept.report
    assert not rejected_path(kept.folder).exists()
    with pytest.raises(ValueError, match=r"data\.bad_rows: unknown policy 'drop'; known: error, quarantine"):
        tokenize("dialogue", path, tokenizer, bad_rows="drop")


def test_a_seeded_choice_counts_broken_rows_as_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The same rows are chosen whether some are broken or not."""
    rows = [{"messages": chat("q", f"a{number}")} for number in range(20)]
    config = SftDataConfig(sequence_length=64, bad_rows="quarantine")

    def chosen(path: Path) -> tuple[list[int], list[int]]:
        source = {"mine": RowsConfig(path=str(path), max_rows=8)}
        found = tokenize_sft(config, source, tokenizer, cache_dir=tmp_path / "cache", seed=3)
        left_out = rejects(found) if found.report.get("quarantined") else {}
        return found.origins[:, 1].tolist(), list(left_out)

    whole, _ = chosen(write(tmp_path / "whole.jsonl", *rows))
    broken = ["{" if number % 2 else row for number, row in enumerate(rows)]
    kept, left_out = chosen(write(tmp_path / "broken.jsonl", *broken))
    assert len(whole) == 8 and sorted(kept + left_out) == whole and kept and left_out


def test_scored_rows_and_rejects_are_all_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """No row vanishes: what the output lacks stands in a file beside it."""
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "id": "half \ud800"}
    path = write(tmp_path / "pairs.jsonl", pair, {**pair, "chosen": ""}, "{", {**pair, "prompt": "other"})
    rows = tokenize("score", path, tokenizer, bad_rows="quarantine")
    target = tmp_path / "out" / "pairs.jsonl"
    scores = np.arange(len(rows), dtype=np.float32)[:, None]
    written = write_scored_rows(
        target, RowsConfig(path=str(path)), rows, scores, attributes=["x"], weights={"x": 1.0}, seed=0
    )
    scored = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert written == 2 and [row["prompt"] for row in scored] == ["q", "other"]
    assert [(row["chosen_reward"], row["rejected_reward"]) for row in scored] == [(0.0, 1.0), (2.0, 3.0)]
    assert scored[0]["id"] == pair["id"], "a column that no format reads is copied as it is"
    left_out = [json.loads(line) for line in (tmp_path / "out" / "pairs.rejected.jsonl").read_text().splitlines()]
    assert [reject["line"] for reject in left_out] == [2, 3] and left_out[1]["raw"] == "{"


@pytest.mark.parametrize("name", ["nemo_rl", "helpsteer2_preference", "helpsteer3"])
def test_rewards_that_score_wrote_are_read_back(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """For the formats that say which response is better by other means, and whose order score follows."""
    record = {key: value for key, value in VALID["pair", name].items() if not key.endswith("_reward")}
    before = find_format(record, ("pair",)).convert(record)
    path = write(tmp_path / "pairs.jsonl", record)
    rows = tokenize("score", path, tokenizer)
    target = tmp_path / "scored.jsonl"
    scores = np.array([[0.25], [-0.75]], dtype=np.float32)
    write_scored_rows(target, RowsConfig(path=str(path)), rows, scores, attributes=["x"], weights={"x": 2.0}, seed=0)
    after = find_format(json.loads(target.read_text()), ("pair",), name=name)
    pair = after.convert(json.loads(target.read_text()))
    assert (pair.messages, pair.chosen, pair.rejected) == (before.messages, before.chosen, before.rejected)
    assert (pair.chosen_reward, pair.rejected_reward) == (0.5, -1.5)
    assert before.chosen_reward == (2.5 if name == "nemo_rl" else None)


@pytest.mark.parametrize(("value", "ok"), [(1e6, True), (-1e6, True), (1.0001e6, False), (-1e29, False)])
def test_numbers_that_losses_can_square(value: float, ok: bool, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The largest that is taken leaves fp32 room for a batch of squares; the next is refused."""
    path = write(tmp_path / "rows.jsonl", GOOD | LABELS | {"helpfulness": value})
    if ok:
        labels = np.asarray(tokenize("rated", path, tokenizer).targets["labels"])
        assert labels[0, 0] == value and np.isfinite(np.float32(1e9) * np.square(2 * labels)).all()
    else:
        with pytest.raises(ValueError, match=r":1: helpfulness: .* is no finite number within 1,000,000 of zero"):
            tokenize("rated", path, tokenizer)
