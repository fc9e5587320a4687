"""The worker's main function in real processes, under our launcher and under torchrun.

The stage is a short one of this test, put in the place of a real stage's module; all around it is what a run uses.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nemo_align.config.compose import compose, to_yaml
from nemo_align.runtime import exit_codes
from nemo_align.runtime.local_launch import launch

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import sys, types
from nemo_align import worker
stage = types.ModuleType("nemo_align.stages.sft")
exec({stage!r}, stage.__dict__)
sys.modules[stage.__name__] = stage
if __name__ == "__main__":
    sys.exit(worker.main("sft", {config!r}))
"""
STAGE = """
import json, os, time
import torch
import torch.distributed as dist

def run(config, topology, stop):
    here = config.run_dir
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Writes configuration and worker script with the given body of the stage; returns the worker's command."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def write(body: str, *overrides: str) -> list[str]:
        config = compose(
            "sft",
            [
                f"run_dir={tmp_path / 'run'}",
                "model=tiny",
                "parallel.tensor=2",
                "data.tokenizer=some.model",
                "data.sequence_length=64",
                "data.train.rows.path=some.jsonl",
                "train.global_batch_size=8",
                "train.epochs=1",
                "optimizer.lr=1e-3",
                *overrides,
            ],
            check_files=False,
        )
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        stage = STAGE + textwrap.indent(textwrap.dedent(body), "    ")
        (tmp_path / "main.py").write_text(WORKER.format(stage=stage, config=str(tmp_path / "config.yaml")))
        return [sys.executable, str(tmp_path / "main.py")]

    return write


def test_a_stage_runs_on_its_grid(command, tmp_path, capfd):
    argv = command("""
        total = torch.ones(1)
        dist.all_reduce(total, group=topology.tensor_group)
        with open(f"{here}/rank_{topology.rank}.json", "w") as out:
            json.dump([total.item(), topology.layout(), torch.get_num_threads()], out)
    """)
    assert launch(argv, 2, tmp_path / "run" / "logs") == exit_codes.SUCCESS
    total, layout, threads = json.loads((tmp_path / "run" / "rank_1.json").read_text())
    assert total == 2.0
    assert (layout["tensor"], layout["data"]) == (2, 1)
    assert threads == int(os.environ.get("OMP_NUM_THREADS", max(1, len(os.sched_getaffinity(0)) // 2)))
    assert (tmp_path / "run" / "log.txt").exists()
    assert capfd.readouterr().err == ""


def test_a_layout_that_does_not_fit_is_said_once(command, tmp_path, capfd):
    assert launch(command("pass"), 3, tmp_path / "run" / "logs") == exit_codes.USER_ERROR
    said = capfd.readouterr().err
    assert said.startswith("error: parallel.tensor=2")
    assert said.count("the 3 processes that were started") == 1
    assert "Traceback" not in said


def test_the_rank_that_failed_is_reported_not_the_one_that_lost_its_peer(command, tmp_path, capfd):
    argv = command("""
        if topology.rank == 1:
            raise RuntimeError("the reason")
        dist.all_reduce(torch.ones(1))
    """)
    assert launch(argv, 2, tmp_path / "run" / "logs") == exit_codes.FAILURE
    said = capfd.readouterr().err
    assert "worker 1 of 2 ended with exit code 1" in said
    assert "RuntimeError: the reason" in said


def test_a_library_s_value_error_keeps_its_traceback(command, tmp_path, capfd):
    argv = command("json.loads('{')")
    assert launch(argv, 2, tmp_path / "run" / "logs") == exit_codes.FAILURE
    assert "Traceback" in capfd.readouterr().err
    assert "JSONDecodeError" in (tmp_path / "run" / "log.txt").read_text()


def test_a_signal_to_one_rank_stops_all_at_the_same_round(command, tmp_path):
    argv = command("""
        from nemo_align.runtime.exit_codes import STOPPED_AFTER_SAVING
        for round in range(10_000):
            if stop.agreed(topology):
                with open(f"{here}/stopped_{topology.rank}", "w") as out:
                    out.write(str(round))
                raise SystemExit(STOPPED_AFTER_SAVING)
            if round == 5:
                with open(f"{here}/pid_{topology.rank}", "w") as out:
                    out.write(str(os.getpid()))
            time.sleep(0.05)
    """)
    code = f"from nemo_align.runtime.local_launch import launch; exit(launch({argv!r}, 2, {str(tmp_path)!r}))"
    parent = subprocess.Popen([sys.executable, "-c", code])
    pid_file = tmp_path / "run" / "pid_1"
    deadline = time.monotonic() + 180
    try:
        while not pid_file.exists() or not pid_file.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(int(pid_file.read_text()), signal.SIGUSR1)
        assert parent.wait(timeout=180) == exit_codes.STOPPED_AFTER_SAVING
    finally:
        parent.kill()  # its workers go with it
        parent.wait()
    rounds = [(tmp_path / "run" / f"stopped_{rank}").read_text() for rank in (0, 1)]
    assert rounds[0] == rounds[1]


@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_while_rank_0_prepares_data_is_honoured_at_once(command, tmp_path, asked):
    argv = command(f"""
        from nemo_align.runtime.rank_order import rank_zero_first
        from nemo_align.runtime.signals import leave_if_asked
        if topology.rank == {asked}:
            os.kill(os.getpid(), 15)
        def prepare():
            for row in range(60_000):
                leave_if_asked()
                time.sleep(0.01)
            open(f"{{here}}/every_row", "w").close()
        rank_zero_first(topology, stop, prepare)
    """)
    assert launch(argv, 2, tmp_path / "run" / "logs") == exit_codes.STOPPED_AFTER_SAVING
    assert not (tmp_path / "run" / "every_row").exists()


def test_a_stop_that_comes_before_the_first_step_ends_every_rank_there(command, tmp_path):
    argv = command("""
        if topology.rank == 1:
            os.kill(os.getpid(), 10)
        stop.leave_if_agreed(topology)
    """)
    assert launch(argv, 2, tmp_path / "run" / "logs") == exit_codes.STOPPED_AFTER_SAVING
    assert "stopped by a signal before the first step" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.full
def test_waiting_for_a_rank_that_goes_on_is_no_hang(command, tmp_path):
    body = """
        from nemo_align.runtime import watchdog
        from nemo_align.runtime.rank_order import rank_zero_first
        def prepare():
            for row in range(100 if topology.is_main else 1):  # the others open what rank 0 has prepared
                watchdog.beat(f"row {row}")
                time.sleep(0.15)
        rank_zero_first(topology, stop, prepare)
    """
    argv = command(body, "runtime.hang_timeout_minutes=0.2")  # 12 s of the 15 s
    assert launch(argv, 2, tmp_path / "run" / "logs") == exit_codes.SUCCESS


def test_a_rank_that_leaves_the_others_waiting_is_told_from_its_stacks(command, tmp_path, capfd):
    argv = command(
        """
        from nemo_align.runtime import watchdog
        watchdog.beat("step 1")
        def never_comes():
            time.sleep(600)
        never_comes() if topology.rank == 1 else dist.all_reduce(torch.ones(1))
        """,
        "runtime.hang_timeout_minutes=0.05",
    )
    assert launch(argv, 2, tmp_path / "run" / "logs") == exit_codes.HUNG
    assert "all 2 ranks answer: compare their stacks" in (tmp_path / "run" / "log.txt").read_text()
    stacks = [(tmp_path / "run" / "hang" / f"rank_{rank}.txt").read_text() for rank in (0, 1)]
    assert "in all_reduce" in stacks[0]
    assert "in never_comes" in stacks[1]


def test_under_torchrun_a_user_error_is_said_once(command, tmp_path):
    argv = command("raise ValueError('the rows hold no answer')")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", argv[1]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("error: the rows hold no answer") == 1
