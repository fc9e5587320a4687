"""A save that is written while training goes on holds the step it was asked for, to the last byte, and fails as one."""

from __future__ import annotations

import json
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import checkpoint_runs as runs
from tests.distributed.pool import RemoteError, WorkerPool, with_topology
from tests.distributed.stage_runs import numbers, run_stage
from tests.stage_inputs import stage_overrides


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def arguments(run: runs.Run, number: int, tokenizer: str) -> dict[str, Any]:
    from nemo_align.data.tokenizer import load_tokenizer

    return {
        "model_chunks": run.chunks,
        "optimizer": run.optimizer,
        "scheduler": run.scheduler,
        "state": {"step": number, "loss": 0.1 + 0.2},
        "verb": "sft",
        "model_config": run.model,
        "reward_config": None,
        "dtype": run.dtype,
        "tokenizer": load_tokenizer(tokenizer),
        "final": False,
    }


def save_twice(topology, folder: str, tokenizer: str, *, dtype: str, fully: bool) -> list[int]:
    """Save step 2 at once and, into another folder, while two more steps are trained; then step 4 likewise."""
    from nemo_align.checkpoint.saver import Saver, Status
    from nemo_align.checkpoint.snapshot import Snapshot
    from nemo_align.runtime.agreement import highest

    write, may_write = Snapshot.write, threading.Event()

    def write_late(snapshot: Snapshot, *args):
        assert may_write.wait(120)
        return write(snapshot, *args)

    run = runs.build(topology, dtype=dtype)
    saver, advanced = Saver(Path(folder) / "beside", topology), []
    for first in (0, 2):
        runs.step(run, first)
        runs.step(run, first + 1)
        settings = {**arguments(run, first + 2, tokenizer), "fully_reshardable": fully}
        runs.save_at_once(Path(folder) / "at_once", first + 2, topology=topology, **settings)
        Snapshot.write = write_late
        try:
            saver.start(first + 2, **settings)
            for number in (10, 11):  # other steps than the ones that follow in the run that is saved
                assert saver.advance(highest(topology, [saver.status])[0]) is None
                assert saver.status == Status.BUSY
                runs.step(run, number)
            may_write.set()
            report = saver.wait()
        finally:
            Snapshot.write = write
        assert report.step == first + 2 and report.num_bytes > 0 and not saver.pending
        advanced.append(report.step)
        may_write.clear()
    return advanced


@pytest.mark.parametrize(
    "layout, dtype, fully",
    [
        ({"data": 2}, "bf16", False),
        ({"tensor": 2, "sequence": True}, "fp32", False),
        ({"pipeline": 2, "virtual_pipeline": 2}, "fp32", False),
        ({"data": 2}, "fp32", True),
    ],
    ids=str,
)
def test_a_save_beside_the_steps_equals_one_that_stops_them(
    layout: dict, dtype: str, fully: bool, pool2: WorkerPool, tokenizer: str, tmp_path: Path
) -> None:
    found = pool2.run(with_topology, save_twice, layout, str(tmp_path), tokenizer, dtype=dtype, fully=fully)
    assert found == [[2, 4], [2, 4]]
    for step in (2, 4):
        name = f"checkpoints/step_{step:07d}"
        at_once, beside = tmp_path / "at_once" / name, tmp_path / "beside" / name
        files = sorted(path.relative_to(at_once) for path in at_once.rglob("*") if path.is_file())
        assert len([path for path in files if path.suffix == ".distcp"]) == 2
        assert files == sorted(path.relative_to(beside) for path in beside.rglob("*") if path.is_file())
        for file in files:
            assert (at_once / file).read_bytes() == (beside / file).read_bytes(), file


SLOW_SECONDS = 2.0  # that writing takes


def save_slowly(topology, folder: str, tokenizer: str) -> list[tuple[int, float, float]]:
    """Two saves beside steps and one that is waited for: (steps meanwhile, seconds blocked, seconds in all) of each."""
    from nemo_align.checkpoint.saver import Saver
    from nemo_align.checkpoint.snapshot import Snapshot
    from nemo_align.runtime.agreement import highest

    write = Snapshot.write

    def write_slowly(snapshot: Snapshot, *args):
        time.sleep(SLOW_SECONDS)
        return write(snapshot, *args)

    run = runs.build(topology)
    runs.step(run, 0)
    saver, found = Saver(folder, topology), []
    Snapshot.write = write_slowly
    try:
        for number in (1, 2):
            saver.start(number, **arguments(run, number, tokenizer))
            report, steps = None, 0
            while report is None:  # what the training loop does
                runs.step(run, steps)
                steps += 1
                report = saver.advance(highest(topology, [saver.status])[0])
            found.append((steps, report.blocked_seconds, report.background_seconds))
        saver.start(3, **arguments(run, 3, tokenizer), copy=False)
        report = saver.wait()
        found.append((0, report.blocked_seconds, report.background_seconds))
    finally:
        Snapshot.write = write
    return found


def test_a_slow_disk_hardly_blocks_the_steps(pool2: WorkerPool, tokenizer: str, tmp_path: Path) -> None:
    for of_rank in pool2.run(with_topology, save_slowly, {"data": 2}, str(tmp_path), tokenizer):
        print(of_rank)
        *beside, waited = of_rank
        for steps, blocked, seconds in beside:
            assert seconds >= SLOW_SECONDS and blocked < seconds / 4, of_rank
            assert steps >= 10, of_rank
        # The measure itself: all of the writing blocks whoever waits for it.
        assert waited[1] >= SLOW_SECONDS, of_rank


def save_with_a_full_disk(topology, folder: str, tokenizer: str) -> list[str]:
    """Rank 1 may not write more than 10,000 bytes into a file; then it may again."""
    from nemo_align.checkpoint.saver import Saver
    from nemo_align.runtime.agreement import highest

    run = runs.build(topology)
    runs.step(run, 0)
    saver, before = Saver(folder, topology), resource.getrlimit(resource.RLIMIT_FSIZE)
    saver.start(1, **arguments(run, 1, tokenizer))
    saver.wait()
    if topology.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    message = ""
    try:
        saver.start(2, **arguments(run, 2, tokenizer))
        while saver.pending:  # what the training loop does once per step
            saver.advance(highest(topology, [saver.status])[0])
    except ValueError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())
    saver.start(3, **arguments(run, 3, tokenizer))
    return [message, *left, saver.wait().path.name]


def test_a_failed_write_on_one_rank_fails_on_all(pool2: WorkerPool, tokenizer: str, tmp_path: Path) -> None:
    one, two = pool2.run(with_topology, save_with_a_full_disk, {"data": 2}, str(tmp_path), tokenizer)
    assert one == two
    message, *names = one
    assert message.startswith("the checkpoint of step 2 could not be written: rank 1: ") and "\n" not in message
    assert f"{tmp_path}/checkpoints/.tmp-step_0000002-" in message and "__1_0.distcp: File too large." in message
    assert names == ["step_0000001", "step_0000003"]  # no temporary folder is left, and the next save goes through


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_every_save_of_a_run_is_published_and_told(asynchronous: str, pool2, stage_inputs, policy, tmp_path) -> None:
    overrides = [*stage_overrides(stage_inputs, "sft"), f"checkpoint.init_from={policy}", "train.max_steps=5"]
    overrides += ["checkpoint.save_every=1", f"checkpoint.asynchronous={asynchronous}"]
    records = run_stage(pool2, "sft", tmp_path, overrides, {"data": 2, "overlap_param_gather": False})
    saves = numbers(records, "save")
    assert [record["step"] for record in saves] == [1, 2, 3, 4, 5]
    assert all(record["save/gigabytes"] > 0 and record["save/blocked_seconds"] > 0 for record in saves)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_0000003", "step_0000004", "step_0000005"]  # keep_last=2 and the final one
    steps = [json.loads((tmp_path / "checkpoints" / name / "manifest.json").read_text())["state"] for name in names]
    assert [state["step"] for state in steps] == [3, 4, 5]


def test_too_little_space_is_said_before_anything_is_written(pool2: WorkerPool, tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(RemoteError) as caught:
        pool2.run(with_topology, save_without_space, {"data": 2}, str(tmp_path), tokenizer)
    assert caught.value.type_name == "ValueError"
    assert "the next checkpoint needs" in str(caught.value) and "make room there" in str(caught.value)
    assert not any((tmp_path / "checkpoints").iterdir())


def save_without_space(topology, folder: str, tokenizer: str) -> None:
    from nemo_align.checkpoint import snapshot
    from nemo_align.checkpoint.saver import Saver

    sizes = snapshot._size
    snapshot._size = lambda data: sizes(data) << 40  # as if the model were that large
    try:
        Saver(folder, topology).start(1, **arguments(runs.build(topology), 1, tokenizer))
    finally:
        snapshot._size = sizes
