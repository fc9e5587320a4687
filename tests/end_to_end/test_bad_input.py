"""Bad data through the real command on two ranks: one message, exit code 2, no rank left waiting, no traceback."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.bad_input_tally import tried
from tests.end_to_end.commands import run
from tests.stage_inputs import MODEL, VOCABULARY, StageInputs, stage_overrides

# From the start of the command to its end, nearly all of it the start of Python and torch on a machine that may be
# busy. A collective that waited for a rank which has gone would take runtime.distributed_timeout_minutes, raised here.
BOUND_SECONDS = 540.0
PATIENT = "runtime.distributed_timeout_minutes=60"


def change(number: int, **columns: object) -> Callable[[list[str]], list[str]]:
    def spoil(lines: list[str]) -> list[str]:
        lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | columns)
        return lines

    return spoil


def put(number: int, line: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [*lines[: number - 1], line, *lines[number:]]


HALF = [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}]
TWO_ANSWERS = [{"role": "user", "content": "q"}, *[{"role": "assistant", "content": "a"}] * 2]
# name -> (verb, train or validation, how its rows are spoilt, what stands behind the file's name)
ROWS = {
    "broken JSON": ("sft", "train", put(5, '{"messages": ['), ":5: not valid JSON"),
    "NaN reward": ("preference", "train", change(7, chosen_reward=float("nan")), ":7: chosen_reward: nan is no finite"),
    "two answers": ("sft", "train", change(3, messages=TWO_ANSWERS), ":3: messages: turn 3 is assistant, expected"),
    "no answer": ("sft", "train", change(1, messages=TWO_ANSWERS[:1]), ":1: messages: no assistant turn"),
    "empty dialogue": ("sft", "validation", change(2, messages=[]), ":2: messages: no turns"),
    "half a character": ("sft", "train", change(4, messages=HALF), ":4: messages[0].content: half a character"),
    "missing column": ("sft", "train", put(9, '{"other": 1}'), ":9: messages: missing"),
    "wrong columns": ("sft", "train", put(1, '{"other": 1}'), ":1: columns: no row format fits other"),
    "key twice": ("sft", "train", put(2, '{"messages": 1, "messages": 2}'), ":2: the key 'messages' stands"),
    "deep": ("sft", "train", put(2, "[" * 100_000), ":2: nested too deeply"),
    "long number": ("sft", "train", put(2, '{"messages": ' + "9" * 5000 + "}"), ":2: not valid JSON: Exceeds"),
    "no rows": ("sft", "train", lambda lines: ["", " "], ": no rows"),
    "one response twice": ("preference", "train", change(5, chosen="a", rejected="a"), ":5: rejected: the same text"),
    "empty response": ("preference", "train", change(2, rejected=" "), ":2: rejected: empty response"),
    "one reward": ("preference", "validation", change(3, rejected_reward=None), ":3: rejected_reward: missing while"),
    "inverted": ("preference", "train", change(6, rejected_reward=99), ":6: chosen_reward: "),
    "huge reward": ("preference", "train", change(6, chosen_reward=1e29), ":6: chosen_reward: 1e+29 is no finite"),
    "score as text": ("reward", "train", change(8, clarity="4"), ":8: clarity: expected a number, found a string '4'"),
    "infinite score": ("reward", "validation", change(1, safety=float("inf")), ":1: safety: inf is no finite"),
    "answer is a list": ("reward", "train", change(33, response=[]), ":33: response: 0 messages"),
}  # fmt: skip
IN_THE_FAST_PART = ("broken JSON",)
CASES = [pytest.param(name, marks=() if name in IN_THE_FAST_PART else pytest.mark.full) for name in ROWS]


def refused(tmp_path: Path, *arguments: str) -> str:
    """Run the command on two ranks and return its one error message."""
    tried["commands"] += 1
    done = run(*arguments, PATIENT, "parallel.data=2", "run_dir=run", cwd=tmp_path, timeout=BOUND_SECONDS)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and done.stderr.splitlines()[-1] == errors[0], done.stderr
    log = tmp_path / "run" / "logs" / "rank_1.txt"  # none if the command refused before it started workers
    other = log.read_text() if log.is_file() else errors[0]
    assert errors[0] in other.splitlines(), "rank 1 ends by itself with the same message, not by the launcher's hand"
    for text in (done.stderr, done.stdout, other):
        assert "Traceback" not in text and "rank 1 failed" not in text, text
    assert not [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if f"{tmp_path}/run" in " ".join(process.info["cmdline"] or ())
    ]
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    return errors[0].removeprefix("error: ")


def spoilt(inputs: StageInputs, name: str, folder: Path) -> tuple[str, Path, list[str], str]:
    verb, split, spoil, message = ROWS[name]
    kind = {"sft": "dialogues", "reward": "rated", "preference": "pairs"}[verb]
    source = inputs.rows(kind if split == "train" else f"{kind}_held_out")
    path = folder / "spoilt.jsonl"
    path.write_text("\n".join(spoil(source.read_text().splitlines())) + "\n")
    return verb, path, [*MODEL, *stage_overrides(inputs, verb), f"data.{split}.rows.path={path}"], message


@pytest.fixture(scope="session")
def policy_run(stage_inputs: StageInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of an sft run, which preference training starts from."""
    folder = tmp_path_factory.mktemp("policy_run")
    done = run("sft", *MODEL, *stage_overrides(stage_inputs, "sft"), "train.max_steps=1", "run_dir=run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_row_is_named(
    name: str, stage_inputs: StageInputs, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    verb, path, arguments, message = spoilt(stage_inputs, name, tmp_path)
    if verb == "preference":
        arguments = [argument for argument in arguments if not argument.startswith("model")]
        arguments.append(f"checkpoint.init_from={request.getfixturevalue('policy_run')}")
    said = refused(tmp_path, verb, *arguments)
    assert said.startswith(f"{path}{message}") and "; " in said, said


def spoil_ids(prefix: Path) -> str:
    """The last id becomes one beyond the vocabulary."""
    content = bytearray(prefix.with_suffix(".bin").read_bytes())
    content[-2:] = struct.pack("<H", VOCABULARY)
    prefix.with_suffix(".bin").write_bytes(content)
    return f".bin: token {len(content) // 2 - 1:,} (sequence 40) has id {VOCABULARY}, but the vocabulary has"


def cut_bin(prefix: Path) -> str:
    content = prefix.with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").write_bytes(content[:-100])
    return f".bin: holds {len(content) // 2 - 50:,} tokens, its .idx lists"


def absurd_counts(prefix: Path) -> str:
    content = prefix.with_suffix(".idx").read_bytes()
    prefix.with_suffix(".idx").write_bytes(content[:18] + struct.pack("<QQ", 2**62, 2**62) + content[34:])
    return f".idx: {len(content):,} bytes, but its {2**62:,} sequences"


def no_index(prefix: Path) -> str:
    prefix.with_suffix(".idx").write_bytes(b"\0" * 100)
    return ".idx: not an index of Megatron's format"


PAIRS = {
    "ids beyond the vocabulary": (spoil_ids, "data.phases.first.blend.text.path"),
    "cut off": (cut_bin, "data.phases.second.blend.text.path"),
    "cut off, held out": (cut_bin, "data.validation.text.path"),
    "absurd counts": (absurd_counts, "data.phases.first.blend.text.path"),
    "no index": (no_index, "data.validation.text.path"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "cut off" else pytest.mark.full) for name in PAIRS]
)
def test_a_wrong_pair_is_named(name: str, stage_inputs: StageInputs, tmp_path: Path) -> None:
    """Contents are read by rank 0 alone; the other rank must not enter Megatron-core's barrier meanwhile."""
    spoil, key = PAIRS[name]
    prefix = tmp_path / "spoilt"
    for suffix in (".bin", ".idx"):
        prefix.with_suffix(suffix).write_bytes(stage_inputs.blend.with_suffix(suffix).read_bytes())
    message = spoil(prefix)
    said = refused(tmp_path, "pretrain", *MODEL, *stage_overrides(stage_inputs, "pretrain"), f"{key}={prefix}")
    assert said.startswith(f"{prefix}{message}"), said
    assert "; write the pair again" in said or "; set data.tokenizer" in said


def test_quarantined_rows_are_left_out_on_every_rank(stage_inputs: StageInputs, tmp_path: Path) -> None:
    """Training and held-out rows; the run ends well and says what it left out."""
    _, _, arguments, _ = spoilt(stage_inputs, "broken JSON", tmp_path)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(stage_inputs.rows("dialogues_held_out").read_text() + '{"messages": []}\n')
    arguments = [
        *("sft", *arguments, "parallel.data=2", "data.bad_rows=quarantine", "data.cache_dir=cache"),
        f"data.validation.rows.path={held_out}",
    ]
    tried["commands"] += 1
    done = run(*arguments, "run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text, number, line in (("1 of 33 rows are left out", 32, 5), ("1 of 8 rows are left out", 7, 8)):
        assert text in done.stderr and f"{number} examples" in done.stderr
        assert [line] == [
            reject["line"]
            for file in (tmp_path / "cache").glob("*.rejected.jsonl")
            for reject in map(json.loads, file.read_text().splitlines())
            if reject["line"] == line
        ]


@pytest.mark.full
@pytest.mark.parametrize("how", ["folder", "unreadable"])
def test_what_is_no_file_of_rows(how: str, stage_inputs: StageInputs, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if how == "folder":
        path.mkdir()
    else:
        path.symlink_to("/proc/self/mem")  # exists, and cannot be read even by root
    arguments = [*MODEL, *stage_overrides(stage_inputs, "sft"), f"data.train.rows.path={path}"]
    said = refused(tmp_path, "sft", *arguments)
    assert str(path) in said and ("holds no file; give" in said if how == "folder" else "check the file" in said)
