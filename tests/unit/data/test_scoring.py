"""Rows to be scored, and the rewards written back."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_align.config.data import PreferenceDataConfig, RowsConfig, ScoreDataConfig
from nemo_align.data.preference import tokenize_preference
from nemo_align.data.scoring import tokenize_scoring, write_scored_rows
from nemo_align.data.tokenized_rows import TokenizedRows
from nemo_align.data.tokenizer import Tokenizer

WEIGHTS = {"x": 0.3, "y": -0.7}


def write(path: Path, *records: dict[str, Any]) -> RowsConfig:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return RowsConfig(path=str(path))


def score(source: RowsConfig, tokenizer: Tokenizer, folder: Path, **config: Any) -> TokenizedRows:
    return tokenize_scoring(
        ScoreDataConfig(**{"sequence_length": 4096} | config), source, tokenizer, cache_dir=folder / "cache", seed=3
    )


def finish(folder: Path, source: RowsConfig, rows: TokenizedRows, scores: np.ndarray) -> list[dict[str, Any]]:
    target = folder / "out" / "scored.jsonl"
    count = write_scored_rows(target, source, rows, scores, attributes=["x", "y"], weights=WEIGHTS, seed=3)
    assert [file.name for file in target.parent.iterdir()] == ["scored.jsonl"]
    written = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert len(written) == count
    return written


def test_pairs_get_both_rewards_with_every_digit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"prompt": f"q{n}", "chosen": f"good {n} é", "rejected": "poor", "id": n} for n in range(4)]
    records[1]["rejected"] = records[1]["chosen"]  # also equal responses are scored
    source = write(tmp_path / "pairs.jsonl", *records)
    rows = score(source, tokenizer, tmp_path)
    assert len(rows) == 8 and rows.report["responses_per_row"] == 2
    assert rows.origins[:, 1].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    texts = [tokenizer.decode(rows.sequences(i)[0][0].tolist(), skip_control=False) for i in range(2)]
    assert texts[0].endswith("Assistant\ngood 0 é\n<extra_id_2>") and texts[1].endswith("Assistant\npoor\n<extra_id_2>")
    scores = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    written = finish(tmp_path, source, rows, scores)
    for n, row in enumerate(written):
        assert {name: row[name] for name in records[n]} == records[n]
        for side, values in (("chosen", scores[2 * n]), ("rejected", scores[2 * n + 1])):
            assert row[f"{side}_scores"] == {"x": float(values[0]), "y": float(values[1])}
            assert row[f"{side}_reward"] == 0.3 * float(values[0]) - 0.7 * float(values[1])


def test_scored_pairs_train_rpo(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 5}
    source = write(tmp_path / "pairs.jsonl", record)
    rows = score(source, tokenizer, tmp_path)
    finish(tmp_path, source, rows, np.array([[1.0, 0.0], [0.0, 1.0]]))
    scored = {"scored": RowsConfig(path=str(tmp_path / "out" / "scored.jsonl"))}
    where = {"cache_dir": tmp_path / "cache", "seed": 0, "preference_loss": "rpo_bwd_kl"}
    trained = tokenize_preference(PreferenceDataConfig(sequence_length=4096), scored, tokenizer, **where)
    assert trained.targets["chosen_reward"][0] == np.float32(0.3), "our rewards go before older score_ columns"
    assert trained.targets["rejected_reward"][0] == np.float32(-0.7)


def test_dialogues_get_one_reward(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "rows.jsonl", {"prompt": "q", "response": "a"}, {"prompt": "q", "response": "b"})
    rows = score(source, tokenizer, tmp_path)
    written = finish(tmp_path, source, rows, np.array([[1.0, 1.0], [2.0, 0.5]]))
    assert written[1] == {
        "prompt": "q",
        "response": "b",
        "reward": 0.3 * 2.0 - 0.7 * 0.5,
        "scores": {"x": 2.0, "y": 0.5},
    }
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    unanswered = write(tmp_path / "open.jsonl", {"messages": messages})
    with pytest.raises(ValueError, match=r"open\.jsonl:1: messages: the last turn is not a response"):
        score(unanswered, tokenizer, tmp_path)


def test_a_dropped_row_is_dropped_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"prompt": "q", "chosen": "a" * (5 + 90 * (n == 1)), "rejected": "b", "n": n} for n in range(3)]
    source = write(tmp_path / "pairs.jsonl", *records)
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: length: \d+ tokens"):
        score(source, tokenizer, tmp_path, sequence_length=80)
    rows = score(source, tokenizer, tmp_path, sequence_length=80, overlong="drop")
    assert rows.report["dropped_overlong"] == 1 and rows.report["kept"] == 2 and len(rows) == 4
    assert [row["n"] for row in finish(tmp_path, source, rows, np.zeros((4, 2)))] == [0, 2]


def test_a_choice_of_rows_is_written_back_to_its_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "rows.jsonl", *({"prompt": "q", "response": f"a{n}"} for n in range(30)))
    source.max_rows = 7
    rows = score(source, tokenizer, tmp_path)
    written = finish(tmp_path, source, rows, np.arange(14.0).reshape(7, 2))
    expected = [tokenizer.decode(rows.sequences(i)[0][0].tolist()).split("\n")[-2] for i in range(7)]
    assert [row["response"] for row in written] == expected
    assert [row["scores"]["x"] for row in written] == [0, 2, 4, 6, 8, 10, 12]


def test_nothing_is_written_when_something_is_wrong(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "rows.jsonl", {"prompt": "q", "response": "a"}, {"prompt": "q", "response": "b"})
    rows = score(source, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="row 2: the reward model gave a score that is not finite"):
        finish(tmp_path, source, rows, np.array([[1.0, 1.0], [np.nan, 1.0]]))
    write(tmp_path / "rows.jsonl", {"prompt": "q", "response": "a"})
    with pytest.raises(ValueError, match=r"changed while it was scored \(1 of 2 rows found\)"):
        finish(tmp_path, source, rows, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="give one for each attribute: x, z"):
        write_scored_rows(
            tmp_path / "o.jsonl", source, rows, np.zeros((2, 2)), attributes=["x", "z"], weights=WEIGHTS, seed=3
        )
    assert not (tmp_path / "o.jsonl").exists() and not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write(tmp_path / "rows.jsonl", *({"prompt": "q", "response": f"a{n}"} for n in range(30)))
    rows = score(source, tokenizer, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(ValueError) as caught:
            finish(tmp_path, source, rows, np.zeros((30, 2)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path}/out/scored.jsonl cannot be written (") and "File too large" in said
    assert "make room there and start the same command again" in said and not list((tmp_path / "out").iterdir())
    assert len(finish(tmp_path, source, rows, np.zeros((30, 2)))) == 30
