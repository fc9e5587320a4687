"""No task is trained on in one stage and held out in another, and a task's copies go where it goes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_align.data.indexed import check_indexed_dataset
from nemo_align.data.tokenizer import load_tokenizer
from quickstart.split import VALIDATION, digest, divide, normalise, split_of

TOOL = Path(__file__).resolve().parents[3] / "tools" / "quickstart_data.py"
ROW_FILES = ("code_sft/", "general_sft/", "reward/", "preference/tasks_", "preference/code_")


def write(folder: Path) -> Path:
    subprocess.run([sys.executable, str(TOOL), "--small", "--output", str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("quickstart") / "data")


def rows(data: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def task_of(row: dict) -> str:
    return row["prompt"] if "prompt" in row else row["messages"][0]["content"]


def test_copies_of_a_task_are_one_task() -> None:
    assert normalise("What IS  2 + 3?\n") == normalise("what is 2 + 3") == "what is 2 + 3"
    assert normalise("what is 2 - 3") != normalise("what is 2 + 3")
    assert split_of("Add  two NUMBERS.") == split_of("add two numbers")
    assert 0.07 < len(divide((str(n), n) for n in range(10_000))[VALIDATION]) / 10_000 < 0.09


def test_the_split_never_changes() -> None:
    # Held-out tasks of published runs must stay held out.
    assert digest("add two numbers") == 9031565739261786251  # of `b2sum -l 64`, big-endian


def test_a_task_is_held_out_everywhere_or_nowhere(data: Path) -> None:
    train = {normalise(task_of(row)) for name in ROW_FILES for row in rows(data, f"{name}train")}
    held_out = {normalise(task_of(row)) for name in ROW_FILES for row in rows(data, f"{name}validation")}
    assert len(train) > 100 and len(held_out) > 20
    assert not train & held_out


def test_pretraining_has_no_held_out_task(data: Path) -> None:
    tokenizer = load_tokenizer(data / "tokenizer" / "tokenizer.model")
    held_out = {normalise(task_of(row)) for name in ROW_FILES for row in rows(data, f"{name}validation")}
    for name in ("pretrain/code", "continued/qa"):
        for text in documents(data / name, tokenizer):
            task = text.removeprefix("Question: ").partition("\nAnswer: ")[0] if "qa" in name else text[2:]
            known = {normalise(task)} if "qa" in name else {normalise(task[:end]) for end in ends_of_lines(task)}
            assert not known & held_out


def ends_of_lines(text: str) -> list[int]:
    return [position for position, character in enumerate(text) if character == "\n"]


def documents(prefix: Path, tokenizer) -> list[str]:
    import numpy as np

    info = check_indexed_dataset(prefix, vocab_size=tokenizer.vocab_size, complete=True)
    ids = np.fromfile(f"{prefix}.bin", dtype=info.dtype).tolist()
    found, start = [], 0
    for position, token in enumerate(ids):
        if token == tokenizer.eos_id:
            found.append(tokenizer.decode(ids[start:position]))
            start = position + 1
    assert len(found) == info.num_documents and start == len(ids)
    return found


def test_rows_fit_and_the_manifest_counts_them(data: Path) -> None:
    from quickstart.amounts import Amounts
    from quickstart.output import Output

    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    output = Output(data, load_tokenizer(data / "tokenizer" / "tokenizer.model"))
    for name in ROW_FILES:
        for split in ("train", "validation"):
            counts = manifest["files"][f"{name}{split}"]
            lengths = [output.row_tokens(row) for row in rows(data, f"{name}{split}")]
            assert (counts["rows"], counts["tokens"]) == (len(lengths), sum(lengths))
            assert max(lengths) <= Amounts().row_tokens * (2 if name.startswith("preference") else 1)
    assert {source["licence"] for source in manifest["sources"].values()} >= {"Apache-2.0", "BSD-3-Clause"}


def test_rewards_put_the_right_answer_first(data: Path) -> None:
    pairs = rows(data, "preference/tasks_train")
    assert all(pair["chosen_reward"] == 1.0 > pair["rejected_reward"] for pair in pairs)
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert not any("chosen_reward" in pair for pair in rows(data, "preference/code_train"))


def test_two_per_cent_of_general_sft_is_code(data: Path) -> None:
    general = rows(data, "general_sft/train")
    code = [row for row in general if "def main_solution" in row["messages"][1]["content"]]
    assert 0.01 <= len(code) / len(general) <= 0.03
    known = {task_of(row) for row in rows(data, "code_sft/train")}
    assert {task_of(row) for row in code} <= known


@pytest.mark.full
def test_the_same_files_byte_for_byte(data: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again")
    names = sorted(path.relative_to(data) for path in data.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert [name for name in names if (data / name).read_bytes() != (again / name).read_bytes()] == []


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    from quickstart.amounts import Amounts
    from quickstart.build import build

    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="choose another --output"):
        build(tmp_path, Amounts().small())
    assert (tmp_path / "notes.txt").read_text() == "mine"
