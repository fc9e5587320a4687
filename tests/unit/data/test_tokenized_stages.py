"""From files of rows to tokenized rows, for sft, regression and preference."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_align.config.data import PreferenceDataConfig, RewardDataConfig, RowsConfig, SelectConfig, SftDataConfig
from nemo_align.data.chat import Message
from nemo_align.data.chat_template import render_dialogue, render_prompt_response, render_rated
from nemo_align.data.preference import tokenize_preference
from nemo_align.data.regression import tokenize_regression
from nemo_align.data.sft import tokenize_sft
from nemo_align.data.tokenized_rows import TokenizedRows, rejected_path
from nemo_align.data.tokenizer import Tokenizer
from tests.unit.data.bad_rows_corpus import VALID

LENGTH = {"sequence_length": 4096}


class Workbench:
    """Writes rows to a file and tokenizes them."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def rows(self, *records: dict[str, Any], name: str = "rows") -> dict[str, RowsConfig]:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return {name: RowsConfig(path=str(path))}

    def sft(self, *records: dict[str, Any], **config: Any) -> TokenizedRows:
        where = {"cache_dir": self.folder / "cache", "seed": 0}
        return tokenize_sft(SftDataConfig(**LENGTH | config), self.rows(*records), self.tokenizer, **where)

    def regression(
        self, *records: dict[str, Any], attributes: Sequence[str] = ("x", "y"), **config: Any
    ) -> TokenizedRows:
        where = {"cache_dir": self.folder / "cache", "seed": 0, "attributes": attributes}
        return tokenize_regression(RewardDataConfig(**LENGTH | config), self.rows(*records), self.tokenizer, **where)

    def preference(
        self, *records: dict[str, Any], loss: str = "dpo", select: dict | None = None, **config: Any
    ) -> TokenizedRows:
        settings = PreferenceDataConfig(select=SelectConfig(**(select or {})), **LENGTH | config)
        where = {"cache_dir": self.folder / "cache", "seed": 0, "preference_loss": loss}
        return tokenize_preference(settings, self.rows(*records), self.tokenizer, **where)

    def text(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens.tolist(), skip_control=False)


@pytest.fixture
def bench(tmp_path: Path, tokenizer: Tokenizer) -> Workbench:
    return Workbench(tmp_path, tokenizer)


def outcome(make: Callable[[], TokenizedRows]) -> TokenizedRows | str:
    """The rows, or the error's text."""
    try:
        return make()
    except ValueError as error:
        return str(error)


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def turns(*contents: str) -> list[Message]:
    return [Message(**message) for message in chat(*contents)]


def test_sft_is_the_rendered_dialogue(bench: Workbench, tokenizer: Tokenizer) -> None:
    rows = bench.sft({"messages": chat("q1", "a1", "q2", "a2")}, {"messages": chat("only", "one")}, default_system="s")
    assert len(rows) == 2 and rows.report["rows"] == rows.report["kept"] == 2
    for index, messages in enumerate([turns("q1", "a1", "q2", "a2"), turns("only", "one")]):
        tokens, mask = render_dialogue(messages, tokenizer, "s")
        assert [array.tolist() for array in rows.sequences(index)[0]] == [tokens, mask]
        assert rows.loss_tokens[index] == sum(mask) and rows.lengths[index].tolist() == [len(tokens)]


def test_sources_follow_one_another(bench: Workbench, tmp_path: Path, tokenizer: Tokenizer) -> None:
    sources = bench.rows({"messages": chat("a", "b")}, {"messages": chat("c", "d")}, name="first")
    sources |= bench.rows({"prompt": "e", "completion": "f"}, name="second")
    rows = tokenize_sft(SftDataConfig(**LENGTH), sources, tokenizer, cache_dir=tmp_path / "cache", seed=0)
    assert rows.sources == ["first", "second"]
    assert rows.origins.tolist() == [[0, 1], [0, 2], [1, 1]]
    assert "first+second: 3 examples" in rows.summary()


def test_settings_and_content_make_another_cache(bench: Workbench) -> None:
    row = {"messages": chat("q", "a")}
    first = bench.sft(row)
    assert bench.sft(row).folder == first.folder
    others = [bench.sft(row, default_system="s"), bench.sft(row, sequence_length=99), bench.sft(row, row)]
    assert len({rows.fingerprint for rows in [first, *others]}) == 4


LONG = chat("oldest question", "oldest answer", "older question", "older answer", "last question", "last answer")


def test_sft_truncation_drops_the_oldest_exchanges(bench: Workbench) -> None:
    system = {"role": "system", "content": "Be brief."}
    whole = int(bench.sft({"messages": [system, *LONG]}).lengths[0, 0])
    texts = {}
    for limit in range(whole, 0, -1):
        records = [{"messages": [system, *LONG]}, {"messages": chat("q", "a")}]
        rows = outcome(lambda limit=limit, records=records: bench.sft(*records, sequence_length=limit))
        if isinstance(rows, str):
            assert "no example is left" in rows and '"dropped_overlong": 2' in rows
            break
        assert rows.lengths.max() <= limit and rows.loss_tokens.min() > 0
        counts = rows.report
        assert counts["kept"] + counts["dropped_overlong"] == 2
        if len(rows) == 2:
            assert counts["truncated"] == (limit < whole)
            texts[bench.text(rows.sequences(0)[0][0])] = counts
    assert limit < 40, "the short row still fits where the long one is dropped"
    start = "<extra_id_0>System\nBe brief.\n<extra_id_1>User\n"
    assert [text.removeprefix(start).split("\n")[0] for text in texts] == [
        "oldest question",
        "older question",
        "last question",
    ]
    assert all(text.startswith(start) and text.endswith("last answer\n<extra_id_1>") for text in texts)


def test_ten_tokens_hold_no_dialogue(bench: Workbench) -> None:
    row = {"messages": chat("What is 3 + 3?", "it is 6.")}
    with pytest.raises(ValueError, match=r'no example is left.*"dropped_overlong": 1'):
        bench.sft(row, sequence_length=10)
    with pytest.raises(
        ValueError,
        match=r"rows\.jsonl:1: length: \d+ tokens, data\.sequence_length is 10; raise it, set data\.overlong",
    ):
        bench.sft(row, sequence_length=10, overlong="error")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: length: \d+ tokens even without its older turns"):
        bench.regression(row | {"x": 1}, sequence_length=10, overlong="truncate")
    with pytest.raises(ValueError, match=r"data\.overlong: unknown policy 'cut'"):
        bench.sft(row, overlong="cut")


def test_bad_rows_name_file_and_line(bench: Workbench) -> None:
    good = {"messages": chat("q", "a")}
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: messages: turn 2 is an empty response; remove"):
        bench.sft(good, {"messages": chat("q", "")})
    with pytest.raises(
        ValueError, match=r"rows\.jsonl:2: messages: missing, while earlier rows of the file are messages"
    ):
        bench.sft(good, {"prompt": "q", "completion": "a"})
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: columns: no row format fits text"):
        bench.sft({"text": "x"})
    with pytest.raises(ValueError, match=r"rows\.jsonl: no rows"):
        bench.sft()
    with pytest.raises(ValueError, match=r"does not exist"):
        tokenize_sft(
            SftDataConfig(**LENGTH),
            {"a": RowsConfig(path="nowhere.jsonl")},
            bench.tokenizer,
            cache_dir=bench.folder,
            seed=0,
        )
    assert not list((bench.folder / "cache").glob("*sft_*")), "a failed build leaves nothing"


def test_regression_labels(bench: Workbench, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "nemo_align")
    rows = bench.regression(
        {"prompt": "q", "response": "a", "y": 2, "x": None},
        {"prompt": "q", "response": "b", "y": None, "x": None},
        {"prompt": "q", "response": "c", "y": -100, "x": 0.1},
        attributes=["x", "y"],
    )
    labels = rows.targets["labels"]
    assert labels.dtype == np.float32 and rows.attributes == ["x", "y"]
    np.testing.assert_array_equal(labels, np.array([[np.nan, 2], [0.1, np.nan]], np.float32))
    assert rows.report["dropped_unlabelled"] == 1 and rows.report["labels_x"] == rows.report["labels_y"] == 1
    tokens, mask = rows.sequences(0)[0]
    assert tokens.tolist() == render_rated(turns("q", "a"), tokenizer) and not mask.any()
    assert not caplog.records
    bench.regression({"prompt": "q", "response": "a", "x": 1}, attributes=["x", "z"])
    assert "no row has a value for z" in caplog.text
    with pytest.raises(ValueError, match=r'no example is left.*"dropped_unlabelled": 1'):
        bench.regression({"prompt": "q", "response": "a", "x": None})
    with pytest.raises(ValueError, match=r"reward\.attributes"):
        bench.regression({"prompt": "q", "response": "a", "x": 1}, attributes=["x", "x"])


def test_regression_truncates_context_never_the_response(bench: Workbench) -> None:
    row = {"messages": LONG, "x": 1}
    whole = int(bench.regression(row, attributes=["x"]).lengths[0, 0])
    rows = bench.regression(row, attributes=["x"], sequence_length=whole - 1, overlong="truncate")
    assert bench.text(rows.sequences(0)[0][0]).startswith("<extra_id_0>System\n\n<extra_id_1>User\nolder question\n")
    assert bench.text(rows.sequences(0)[0][0]).endswith("last answer\n<extra_id_2>")
    assert rows.report["truncated"] == 1
    with pytest.raises(ValueError, match=r"no example is left"):
        bench.regression(row, attributes=["x"], sequence_length=whole - 1, overlong="drop")


def pair(reward: float | None = None, other: float | None = None, **changes: Any) -> dict[str, Any]:
    row = {"prompt": "q", "chosen": "good", "rejected": "poor one"}
    return row | {"chosen_reward": reward, "rejected_reward": other} | changes


def test_preference_pairs(bench: Workbench, tokenizer: Tokenizer) -> None:
    rows = bench.preference(pair(), pair(2.5, -1))
    chosen, rejected = rows.sequences(0)
    expected = render_prompt_response(turns("q"), "good", tokenizer)
    assert (chosen[0].tolist(), chosen[1].tolist()) == expected
    assert rejected[0].tolist() == render_prompt_response(turns("q"), "poor one", tokenizer)[0]
    assert rows.lengths.shape == (2, 2) and rows.loss_tokens[0] == chosen[1].sum() + rejected[1].sum()
    np.testing.assert_array_equal(rows.targets["chosen_reward"], np.array([np.nan, 2.5], np.float32))
    np.testing.assert_array_equal(rows.targets["rejected_reward"], np.array([np.nan, -1], np.float32))


@pytest.mark.parametrize(
    ("loss", "select", "counts"),
    [
        ("dpo", {}, {"kept": 2, "dropped_ties": 1}),
        ("ipo", {}, {"kept": 2, "dropped_ties": 1}),
        ("dpo", {"ties": "keep"}, {"kept": 3, "ties_kept": 1}),
        ("rpo_bwd_kl", {}, {"kept": 3, "ties_kept": 1}),
        ("rpo_sq", {"ties": "drop"}, {"kept": 2, "dropped_ties": 1}),
        ("dpo", {"min_chosen_reward": 3.0}, {"kept": 1, "dropped_low_reward": 2}),
        ("rpo_fwd_kl", {"min_reward_gap": 1.0}, {"kept": 1, "dropped_small_gap": 2}),
    ],
)
def test_selection(bench: Workbench, loss: str, select: dict[str, Any], counts: dict[str, int]) -> None:
    rows = bench.preference(pair(4, 2), pair(2.5, 2), pair(1, 1), loss=loss, select=select)
    assert {name: value for name, value in rows.report.items() if value and name != "rows"} == counts


def test_identical_responses_are_wrong_rows(bench: Workbench) -> None:
    """There is nothing to prefer, under any loss, and whatever their rewards or a selection say."""
    same = pair(9, 1, rejected="good")
    message = (
        r"rows\.jsonl:2: rejected: the same text as chosen; correct one of the two or remove the row, or set "
        r"data\.bad_rows=quarantine"
    )
    for loss in ("dpo", "ipo", "rpo_bwd_kl"):
        for select in ({}, {"ties": "keep"}, {"min_chosen_reward": 10.0}):
            with pytest.raises(ValueError, match=message):
                bench.preference(pair(4, 2), same, loss=loss, select=select)
    rows = bench.preference(pair(4, 2), same, pair(3, 1), bad_rows="quarantine")
    assert rows.origins.tolist() == [[0, 1], [0, 3]]
    assert rows.report["quarantined"] == 1 and rows.report["quarantined_by_reason"] == {"identical responses": 1}
    [line] = rejected_path(rows.folder).read_text().splitlines()
    rejected = json.loads(line)
    assert (rejected["line"], rejected["row"], rejected["field"]) == (2, 2, "rejected")
    assert rejected["message"].startswith("rejected: the same text as chosen; ") and json.loads(rejected["raw"]) == same
    with pytest.raises(ValueError, match=r"rows\.jsonl: all 1 rows of rows are rejected"):
        bench.preference(same, bad_rows="quarantine")


@pytest.mark.parametrize("name", [name for kind, name in VALID if kind == "pair"])
def test_identical_responses_are_named_by_their_columns(name: str, bench: Workbench) -> None:
    """In every format of pairs."""
    same = json.loads(json.dumps(VALID["pair", name]).replace("worse", "good"))
    chosen, rejected = {
        "nemo_aligner": ("chosen_response", "rejected_response"),
        "nemo_rl": ("completions[0].completion", "completions[1].completion"),
        "helpsteer2_preference": ("response_1", "response_2"),
        "helpsteer3": ("response2", "response1"),
        "sharegpt_pair": ("chosen.value", "rejected.value"),
    }.get(name, ("chosen", "rejected"))
    with pytest.raises(ValueError) as caught:
        bench.preference(same, select={"inverted": "keep"})
    assert f"rows.jsonl:1: {rejected}: the same text as {chosen}; " in str(caught.value)


def test_inverted_rewards(bench: Workbench) -> None:
    with pytest.raises(
        ValueError,
        match=r"rows\.jsonl:2: chosen_reward: 1\.0 is below rejected_reward 2\.0; set data\.select\.inverted",
    ):
        bench.preference(pair(2, 1), pair(1, 2))
    swapped = bench.preference(pair(1, 2), select={"inverted": "swap"})
    assert bench.text(swapped.sequences(0)[0][0]).endswith("poor one\n<extra_id_1>")
    assert (swapped.targets["chosen_reward"][0], swapped.targets["rejected_reward"][0]) == (2, 1)
    assert swapped.report["swapped"] == 1
    kept = bench.preference(pair(1, 2), select={"inverted": "keep"})
    assert bench.text(kept.sequences(0)[0][0]).endswith("good\n<extra_id_1>") and kept.report["inverted_kept"] == 1
    assert len({swapped.fingerprint, kept.fingerprint}) == 2


def test_missing_rewards_are_an_error_where_needed(bench: Workbench) -> None:
    for loss, select in (("rpo_bwd_kl", {}), ("dpo", {"min_chosen_reward": 0.0}), ("ipo", {"min_reward_gap": 0.0})):
        with pytest.raises(
            ValueError, match=r"rows\.jsonl:2: chosen_reward, rejected_reward: missing.*nemo-align score"
        ):
            bench.preference(pair(2, 1), pair(), loss=loss, select=select)
    with pytest.raises(ValueError, match=r"data\.select\.ties: unknown value 'maybe'"):
        bench.preference(pair(), select={"ties": "maybe"})


def test_a_pair_keeps_both_responses_whole(bench: Workbench) -> None:
    row = {"prompt": LONG[:-1], "chosen": "last answer", "rejected": "last but longer answer"}
    whole = int(bench.preference(row).lengths.max())
    starts = []
    for limit in range(whole, 0, -1):
        rows = outcome(lambda limit=limit: bench.preference(row, sequence_length=limit, overlong="truncate"))
        if isinstance(rows, str):
            assert "even without its older turns" in rows
            break
        chosen, rejected = (bench.text(tokens) for tokens, _ in rows.sequences(0))
        assert rows.lengths.max() <= limit
        assert chosen.removesuffix("last answer\n<extra_id_1>") == rejected.removesuffix(
            "last but longer answer\n<extra_id_1>"
        )
        assert rows.loss_tokens[0] == bench.preference(row).loss_tokens[0]
        starts.append(chosen.split("\n")[3])
    assert list(dict.fromkeys(starts)) == ["oldest question", "older question", "last question"]
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: length: \d+ tokens, data\.sequence_length"):
        bench.preference(row, sequence_length=whole - 1)
    both = bench.preference(row, pair(), sequence_length=whole - 1, overlong="drop")
    assert len(both) == 1 and both.report["dropped_overlong"] == 1
