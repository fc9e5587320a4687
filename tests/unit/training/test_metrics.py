"""metrics.jsonl and result.json: nothing is lost, nothing is there twice, every line is standard JSON."""

import json
import resource

import numpy as np
import pytest

from nemo_align.training.metrics import METRICS_FILE, MetricsWriter, finite, read_metrics
from nemo_align.training.result import StageResult, read_result, write_result


def train(step: int, loss: float = 1.0) -> dict:
    return {"kind": "train", "step": step, "loss": loss}


def test_a_record_is_on_disk_as_soon_as_it_is_written(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(train(1, 2.5))
    assert (tmp_path / METRICS_FILE).read_text() == '{"kind": "train", "step": 1, "loss": 2.5}\n'


def test_numbers_that_are_not_finite_become_null_and_are_named(tmp_path):
    MetricsWriter(tmp_path).write(
        {"step": 3, "loss": float("nan"), "grad_norm": np.float32("inf"), "lr": np.float32(0.5)}
    )
    line = (tmp_path / METRICS_FILE).read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record == {"step": 3, "loss": None, "grad_norm": None, "lr": 0.5, "nonfinite": ["loss", "grad_norm"]}


def test_nested_numbers_are_found_by_path():
    record = finite({"a": {"b": [1, float("-inf")]}, "on": True})
    assert record == {"a": {"b": [1, None]}, "on": True, "nonfinite": ["a.b[1]"]}


def test_resume_drops_later_steps_and_a_torn_line_and_keeps_the_rest(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write({"kind": "forward", "name": "reference", "seconds": 2.0})  # of no step: always kept
    for step in range(1, 6):
        writer.write(train(step))
    writer.write({"kind": "validation", "step": 4, "validation/a/loss": 1.0})
    writer.close()
    with open(tmp_path / METRICS_FILE, "a") as stream:
        stream.write('{"kind": "train", "st')

    resumed = MetricsWriter(tmp_path)
    resumed.resume(3)
    for step in range(4, 7):
        resumed.write(train(step, loss=0.5))

    records = read_metrics(tmp_path)
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in records if record["kind"] == "train"] == [1, 1, 1, 0.5, 0.5, 0.5]
    assert records[0]["name"] == "reference" and not any(record["kind"] == "validation" for record in records)


def test_a_validation_repeated_at_the_resumed_step_takes_the_place_of_the_first(tmp_path):
    MetricsWriter(tmp_path).write({"kind": "validation", "step": 2, "loss": 1.0})
    resumed = MetricsWriter(tmp_path)
    resumed.resume(2)
    resumed.write(train(2))
    resumed.write({"kind": "validation", "step": 2, "loss": 0.9})
    resumed.write(train(3))
    assert [(record["kind"], record["loss"]) for record in read_metrics(tmp_path)] == [
        ("train", 1.0),
        ("validation", 0.9),
        ("train", 1.0),
    ]


def test_writing_after_a_crash_without_resume_does_not_continue_the_torn_line(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    MetricsWriter(tmp_path).write(train(2))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=rf"{METRICS_FILE}:2: "):
        read_metrics(tmp_path)


def test_a_result_round_trips_and_an_unfinished_run_has_none(tmp_path):
    assert read_result(tmp_path) is None
    result = StageResult(
        verb="sft", experiment="code", steps=3, layout={"tensor": 2}, last={"validation/a/loss": 1.5}, mfu=0.4
    )
    write_result(tmp_path, result)
    assert read_result(tmp_path) == result
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "complete"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]  # no temporary file stays


def test_a_damaged_result_says_what_to_do(tmp_path):
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match="delete it and start the same command again"):
        read_result(tmp_path)


def test_a_full_disk_is_named_in_one_line(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(train(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))  # bytes: room for no second line
    try:
        with pytest.raises(ValueError) as caught:
            writer.write(train(2))
        writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value).startswith(f"{tmp_path}/metrics.jsonl cannot be written: File too large. Mend that and ")
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    writer.write(train(2))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("what", ["resume", "result"])
def test_a_full_disk_while_a_file_is_replaced_leaves_the_old_one(what, tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write(train(step))
    write_result(tmp_path, StageResult(verb="sft", experiment="code"))
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    act = {
        "resume": lambda: MetricsWriter(tmp_path).resume(3),
        "result": lambda: write_result(tmp_path, StageResult(verb="sft", experiment="other")),
    }[what]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        with pytest.raises(ValueError) as caught:
            act()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    name = {"resume": METRICS_FILE, "result": "result.json"}[what]
    assert str(caught.value) == (
        f"{tmp_path}/{name} cannot be written: File too large. Mend that and start the same command again: it goes on "
        "from the last checkpoint"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old  # and no temporary file
    act()
