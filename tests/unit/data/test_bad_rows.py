"""Every wrong row of the corpus, in every format: refused or set aside with file, line, field and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_align.config.data import (
    PreferenceDataConfig,
    RewardDataConfig,
    RowsConfig,
    ScoreDataConfig,
    SelectConfig,
    SftDataConfig,
)
from nemo_align.data.preference import tokenize_preference
from nemo_align.data.regression import tokenize_regression
from nemo_align.data.row_formats.table import FORMATS
from nemo_align.data.scoring import tokenize_scoring
from nemo_align.data.sft import tokenize_sft
from nemo_align.data.tokenized_rows import TokenizedRows, rejected_path
from nemo_align.data.tokenizer import Tokenizer
from tests.bad_input_tally import tried
from tests.unit.data.bad_rows_corpus import FIVE, VALID, broken_lines, must_be_rejected, mutations

FORMAT_IDS = [pytest.param(kind, name, id=f"{kind}-{name}") for kind, name in VALID]
# A change in one column can be a fault of another: the prompts of chosen and rejected differ, for one.
ALSO_NAMED = {("chosen", "rejected"), ("prompt", "completion"), ("history", "output")}


def tokenize(kind: str, path: Path, tokenizer: Tokenizer, **settings: Any) -> TokenizedRows:
    settings = {"sequence_length": 4096, "cache_dir": str(path.parent / "cache"), **settings}
    where = {"cache_dir": settings["cache_dir"], "seed": 0}
    sources = {"mine": RowsConfig(path=str(path))}
    if kind == "rated":
        return tokenize_regression(RewardDataConfig(**settings), sources, tokenizer, attributes=FIVE, **where)
    if kind == "pair":
        select = SelectConfig(inverted="keep")
        config = PreferenceDataConfig(select=select, **settings)
        return tokenize_preference(config, sources, tokenizer, preference_loss="dpo", **where)
    if kind == "score":
        return tokenize_scoring(ScoreDataConfig(**settings), sources["mine"], tokenizer, **where)
    return tokenize_sft(SftDataConfig(**settings), sources, tokenizer, **where)


def rejects(rows: TokenizedRows) -> dict[int, dict[str, Any]]:
    """Line -> what the file of rejected rows says of it."""
    lines = rejected_path(rows.folder).read_text(encoding="utf-8").splitlines()
    return {reject["line"]: reject for reject in map(json.loads, lines)}


def test_every_format_has_a_valid_row() -> None:
    assert {(form.kind, form.name) for form in FORMATS} == set(VALID)


@pytest.mark.parametrize(("kind", "name"), FORMAT_IDS)
def test_every_wrong_row_is_set_aside_with_its_field(
    kind: str, name: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    changed = list(mutations(kind, name))
    lines = [json.dumps(VALID[kind, name]), *(json.dumps(mutation.row) for mutation in changed)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    tried["corpus"] += len(changed)

    rows = tokenize(kind, path, tokenizer, bad_rows="quarantine")
    found = rejects(rows)
    assert 1 not in found, found[1]
    for number, mutation in enumerate(changed, start=2):
        reject = found.get(number)
        if reject is None:
            assert not must_be_rejected(mutation), mutation.name
            continue
        assert (reject["file"], reject["row"], reject["source"]) == (str(path), number, "mine")
        assert reject["raw"] == lines[number - 1]
        field, remedy = reject["field"], reject["message"].partition("; ")[2]
        root = field.partition("[")[0].partition(".")[0]
        assert root == mutation.path[0] or (mutation.path[0], root) in ALSO_NAMED, (mutation.name, reject["message"])
        assert reject["message"].startswith(f"{field}: ") and len(remedy) > 5, reject["message"]
        assert len(reject["message"]) < 400 and reject["message"].isprintable()
    report = rows.report
    dropped = sum(number for reason, number in report.items() if reason.startswith("dropped_"))
    assert report["rows"] == len(lines) == report["kept"] + dropped + report["quarantined"]
    assert report["quarantined"] == len(found) == sum(report["quarantined_by_reason"].values())
    kept = set(range(1, len(lines) + 1)) - set(found)
    assert set(rows.origins[:, 1].tolist()) <= kept


@pytest.mark.parametrize(("kind", "name"), FORMAT_IDS)
def test_every_broken_line_is_set_aside(kind: str, name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    valid = json.dumps(VALID[kind, name]).encode()
    broken = broken_lines(VALID[kind, name])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([valid, *(line for line, _ in broken.values()), valid]))
    tried["corpus"] += len(broken)
    rows = tokenize(kind, path, tokenizer, bad_rows="quarantine")
    found = rejects(rows)
    assert list(found) == list(range(2, len(broken) + 2)) and rows.report["kept"] == 2
    for (case, (line, message)), reject in zip(broken.items(), found.values(), strict=True):
        assert message in reject["message"] and "; " in reject["message"], (case, reject["message"])
        assert reject["raw"] == line.decode("utf-8", "backslashreplace")


@pytest.mark.parametrize("kind", ["dialogue", "rated", "pair", "score"])
def test_the_first_broken_line_ends_the_run_unless_asked_otherwise(
    kind: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    valid = VALID[
        kind if kind != "score" else "pair", "prompt_chosen_rejected" if kind in ("pair", "score") else "messages"
    ]
    for number, (case, (line, message)) in enumerate(broken_lines(valid).items()):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(json.dumps(valid).encode() + b"\n\n" + line + b"\n")
        tried["corpus"] += 1
        with pytest.raises(ValueError) as caught:
            tokenize(kind, path, tokenizer)
        said = str(caught.value)
        assert said.startswith(f"{path}:3: ") and message in said, (case, said)
        assert not list((tmp_path / "cache").glob("*.rejected.jsonl"))


@pytest.mark.parametrize(("kind", "name"), [param for param in FORMAT_IDS if param.values[0] != "rated"])
def test_scoring_refuses_the_same_rows(kind: str, name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """`score` finds the format itself: what sft or preference set aside, it does."""
    changed = [mutation for mutation in mutations(kind, name) if must_be_rejected(mutation)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (VALID[kind, name], *(some.row for some in changed))))
    tried["corpus"] += len(changed)
    rows = tokenize("score", path, tokenizer, bad_rows="quarantine")
    assert rows.report["kept"] == 1 and rows.report["quarantined"] == len(changed) > 20
