"""The launcher with real processes. Its workers here import no torch, so that each test takes a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from nemo_align.runtime import exit_codes, local_launch
from nemo_align.runtime.local_launch import launch, number_of_gpus
from nemo_align.runtime.process_state import describe_state
from nemo_align.runtime.restarts import Restarts

ROOT = Path(__file__).resolve().parents[3]
PRELUDE = """
import os, signal, subprocess, sys, time
from nemo_align.runtime.launch_environment import detect
me = detect()
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Writes a worker's script and returns its command."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def write(body: str) -> list[str]:
        script = tmp_path / "worker.py"
        script.write_text(PRELUDE + textwrap.dedent(body))
        return [sys.executable, str(script)]

    return write


def parent_of(argv: list[str], num_workers: int, log_dir: Path, options: str = "") -> subprocess.Popen:
    """A launcher in a process of its own, to be sent signals."""
    call = f"launch({argv!r}, {num_workers}, {str(log_dir)!r}, {options})"
    code = f"from nemo_align.runtime.local_launch import launch; exit({call})"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def pids_in(folder: Path, count: int) -> list[int]:
    wait_for(lambda: len(list(folder.glob("pid_*"))) == count)
    return [int(path.name.removeprefix("pid_")) for path in folder.glob("pid_*")]


def test_ranks_threads_and_outputs(worker, tmp_path, capfd, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "7")  # of some launcher around us
    argv = worker("""
        place = (me.rank, me.world_size, me.local_rank, me.source)
        print(*place, os.environ["OMP_NUM_THREADS"], "RANK" in os.environ)
    """)
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    for _ in range(2):
        assert launch(argv, 3, tmp_path / "logs") == exit_codes.SUCCESS
    assert capfd.readouterr().out == f"0 3 0 local {threads} False\n" * 2
    assert (tmp_path / "logs" / "rank_2.txt").read_text() == f"2 3 2 local {threads} False\n" * 2
    assert not (tmp_path / "logs" / "rank_0.txt").exists()


def test_the_first_failing_worker_ends_the_others_and_is_named(worker, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(local_launch, "_OWN_END_SECONDS", 0.5)
    monkeypatch.setattr(local_launch, "_TERMINATE_SECONDS", 0.5)
    argv = worker("""
        if me.rank == 1:
            print("the reason")
            sys.exit(7)
        time.sleep(60)
    """)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_1.txt").write_text("from an earlier launch\n")
    begin = time.monotonic()
    assert launch(argv, 3, tmp_path / "logs") == 7
    assert time.monotonic() - begin < 50  # less than the 60 s that the others would sleep
    said = capfd.readouterr().err
    assert "worker 1 of 3 ended with exit code 7" in said
    assert "  the reason" in said
    assert "earlier launch" not in said


def test_a_worker_that_ignores_sigterm_is_killed_with_what_it_started(worker, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(local_launch, "_OWN_END_SECONDS", 0.2)
    monkeypatch.setattr(local_launch, "_TERMINATE_SECONDS", 0.5)
    argv = worker(f"""
        if me.rank == 0:
            child = subprocess.Popen(["sleep", "60"])
            open(f"{tmp_path}/pid_{{child.pid}}", "w").close()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        while not [name for name in os.listdir("{tmp_path}") if name.startswith("pid_")]:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert launch(argv, 2, tmp_path / "logs") == 128 + signal.SIGKILL
    said = capfd.readouterr().err
    assert "worker 1 of 2 ended with signal SIGKILL (the kernel does this when memory runs out)" in said
    wait_for(lambda: not alive(pids_in(tmp_path, 1)))


def test_a_user_error_on_all_ranks_is_printed_once(worker, tmp_path, capfd):
    argv = worker("""
        time.sleep(0.0 if me.rank else 0.5)
        print("error: lr is negative", file=sys.stderr)
        sys.exit(2)
    """)
    assert launch(argv, 2, tmp_path / "logs") == exit_codes.USER_ERROR
    assert capfd.readouterr().err == "error: lr is negative\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_signals_reach_every_worker_once(worker, tmp_path, number):
    argv = worker(f"""
        from nemo_align.runtime.signals import StopRequest
        stop = StopRequest()
        stop.install()
        open(f"{tmp_path}/pid_{{os.getpid()}}", "w").close()
        while not stop.requested:
            time.sleep(0.05)
        time.sleep(0.5)  # the save
        print(me.rank, stop._signal.name, flush=True)
        sys.exit(75)
    """)
    parent = parent_of(argv, 2, tmp_path / "logs")
    pids_in(tmp_path, 2)
    parent.send_signal(number)
    out, err = parent.communicate(timeout=30)
    assert parent.returncode == exit_codes.STOPPED_AFTER_SAVING
    assert out == f"0 {number.name}\n"
    assert (tmp_path / "logs" / "rank_1.txt").read_text() == f"1 {number.name}\n"
    assert err == ""


def test_a_stop_during_start_up_waits_for_the_handlers(worker, tmp_path):
    argv = worker(f"""
        open(f"{tmp_path}/pid_{{os.getpid()}}", "w").close()
        time.sleep(1.0)  # imports
        from nemo_align.runtime.signals import StopRequest
        stop = StopRequest()
        stop.install()
        sys.exit(75 if stop.requested else 1)
    """)
    parent = parent_of(argv, 2, tmp_path / "logs")
    pids_in(tmp_path, 2)
    parent.send_signal(signal.SIGTERM)
    parent.communicate(timeout=30)
    assert parent.returncode == exit_codes.STOPPED_AFTER_SAVING


def test_ctrl_c_ends_the_workers(worker, tmp_path):
    argv = worker(f"""
        open(f"{tmp_path}/pid_{{os.getpid()}}", "w").close()
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            sys.exit(130)
    """)
    parent = parent_of(argv, 2, tmp_path / "logs")
    pids = pids_in(tmp_path, 2)
    parent.send_signal(signal.SIGINT)
    _, err = parent.communicate(timeout=30)
    assert parent.returncode == exit_codes.INTERRUPTED
    assert err == ""
    assert not alive(pids)


def test_workers_die_with_a_killed_parent(worker, tmp_path):
    argv = worker(f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(f"{tmp_path}/pid_{{os.getpid()}}", "w").close()
        time.sleep(60)
    """)
    parent = parent_of(argv, 2, tmp_path / "logs")
    pids = pids_in(tmp_path, 2)
    assert len(alive(pids)) == 2
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(pids))
    parent.stdout.close()
    parent.stderr.close()


def test_what_a_killed_parent_left_in_the_temporary_folder_goes_with_the_next_start(worker, tmp_path, monkeypatch):
    argv = worker(f"""
        open(f"{tmp_path}/pid_{{os.getpid()}}", "w").close()
        time.sleep(0 if os.path.exists("{tmp_path}/again") else 60)
    """)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    parent = parent_of(argv, 2, tmp_path / "logs")
    pids_in(tmp_path, 2)
    parent.kill()
    parent.communicate(timeout=30)
    left = list(temporary.glob("nemo_align_*"))
    assert len(left) == 1  # nobody was there to remove it
    (temporary / "nemo_align_of_another_run").mkdir()
    (tmp_path / "again").touch()
    again = parent_of(argv, 2, tmp_path / "logs")
    assert again.communicate(timeout=30)[1] == "" and again.returncode == exit_codes.SUCCESS
    assert [path.name for path in temporary.glob("nemo_align_*")] == ["nemo_align_of_another_run"]


def test_gpus_are_counted_without_torch(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: a)'\necho 'GPU 1: H100 (UUID: b)'\necho '  MIG 1g: x'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert number_of_gpus({}) == 2
    assert number_of_gpus({"CUDA_VISIBLE_DEVICES": "1"}) == 1
    assert number_of_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert number_of_gpus({"CUDA_VISIBLE_DEVICES": "0,-1,1"}) == 1
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert number_of_gpus({}) == 0
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert number_of_gpus({}) == 0


def test_the_launcher_needs_no_torch():
    code = "import sys, nemo_align.runtime.local_launch, nemo_align.worker; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


HANGS_ONCE = """
    from nemo_align.runtime import watchdog
    watchdog._START_SECONDS = watchdog._ANSWER_SECONDS = 0.5
    os.makedirs("{run}/checkpoints", exist_ok=True)
    starts = "{run}/starts_" + str(me.rank)
    with open(starts, "a") as file:
        file.write("x")
    print("step 3 is done", flush=True)
    watchdog.start("{run}", me.rank, me.world_size, 1.0)
    watchdog.know(["here"] * me.world_size)
    watchdog.beat("step 4")
    if os.path.getsize(starts) <= {times}:
        if me.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
    watchdog.stop()
"""


def test_the_worker_that_does_not_answer_is_named_and_killed(worker, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(local_launch, "_ANSWER_SECONDS", 3.0)
    argv = worker(HANGS_ONCE.format(run=tmp_path / "run", times=9))
    assert launch(argv, 3, tmp_path / "logs") == exit_codes.HUNG
    said = capfd.readouterr().err
    assert "worker 1 of 3 does not answer: stopped (state T), last known: step 3 is done" in said
    assert "worker 0 of 3 does not" not in said
    assert "worker 2 of 3 does not" not in said
    assert sorted(path.name for path in (tmp_path / "run" / "hang").iterdir()) == ["rank_0.txt", "rank_2.txt"]


def test_a_hung_run_is_started_again(worker, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(local_launch, "_ANSWER_SECONDS", 3.0)
    (tmp_path / "run" / "checkpoints" / "step_0000002").mkdir(parents=True)
    argv = worker(HANGS_ONCE.format(run=tmp_path / "run", times=1))
    assert launch(argv, 2, tmp_path / "logs", run_dir=tmp_path / "run", max_restarts=1) == exit_codes.SUCCESS
    said = capfd.readouterr().err
    assert said.endswith("restart 1 of 1: worker 1 did not answer; resuming from checkpoints/step_0000002\n")


def test_a_stopped_worker_is_found_where_no_other_waits_for_it(worker, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(local_launch, "_ANSWER_SECONDS", 0.5)
    argv = worker("os.kill(os.getpid(), signal.SIGSTOP) if me.rank == 1 else time.sleep(60)")
    assert launch(argv, 2, tmp_path / "logs", hang_seconds=1.0) == exit_codes.HUNG
    assert capfd.readouterr().err == "worker 1 of 2 does not answer: stopped (state T)\n"


def test_a_killed_worker_is_replaced_until_restarts_no_longer_help(worker, tmp_path, capfd):
    """The third start saves; nothing comes of the others."""
    run = tmp_path / "run"
    argv = worker(f"""
        os.makedirs("{run}/checkpoints", exist_ok=True)
        with open("{run}/starts", "a") as file:
            file.write("x")
        if os.path.getsize("{run}/starts") == 3:
            os.mkdir("{run}/checkpoints/step_0000010")
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert launch(argv, 1, tmp_path / "logs", run_dir=run, max_restarts=2) == 128 + signal.SIGKILL
    restarts = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("worker")]
    killed = "worker 0 was killed by SIGKILL"
    assert restarts == [
        f"restart 1 of 2: {killed}; starting from the beginning: no checkpoint yet",
        f"restart 2 of 2: {killed}; starting from the beginning: no checkpoint yet",
        f"restart 1 of 2: {killed}; resuming from checkpoints/step_0000010",
        f"restart 2 of 2: {killed}; resuming from checkpoints/step_0000010",
        "given up after 2 restarts without progress in between (runtime.max_restarts)",
    ]
    assert (run / "starts").read_text() == "xxxxx"


@pytest.mark.parametrize("code", [exit_codes.FAILURE, exit_codes.USER_ERROR, exit_codes.STOPPED_AFTER_SAVING])
def test_an_error_or_a_stop_is_no_reason_to_start_again(worker, tmp_path, capfd, code):
    argv = worker(f"sys.exit({code})")
    assert launch(argv, 1, tmp_path / "logs", run_dir=tmp_path, max_restarts=3) == code
    assert "restart" not in capfd.readouterr().err


def test_who_asked_for_a_stop_gets_no_restart(worker, tmp_path):
    argv = worker(f"""
        open(f"{tmp_path}/pid_{{os.getpid()}}", "w").close()
        signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        time.sleep(60)
    """)
    parent = parent_of(argv, 1, tmp_path / "logs", f"run_dir={str(tmp_path)!r}, max_restarts=3")
    pids_in(tmp_path, 1)
    time.sleep(1.0)
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=30)
    assert parent.returncode == 128 + signal.SIGKILL
    assert "restart" not in err


def test_progress_is_a_newer_checkpoint_or_a_step_not_reached_before(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"kind": "train", "step": 7}\n{"kind": "tr')
    restarts = Restarts(tmp_path, 1)
    metrics.write_text('{"kind": "train", "step": 6}\n')  # trained again after a resume
    assert restarts.next("why") == "restart 1 of 1: why; starting from the beginning: no checkpoint yet"
    assert restarts.next("why") is None
    metrics.write_text('{"kind": "train", "step": 8}\n')
    assert restarts.next("why") is not None
    assert restarts.next("why") is None
    (tmp_path / "checkpoints" / "step_0000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_0000009.tmp").mkdir()
    assert restarts.next("why") == "restart 1 of 1: why; resuming from checkpoints/step_0000004"
    assert restarts.next("why") is None


def test_states_of_processes():
    child = subprocess.Popen(["sleep", "60"])
    try:
        wait_for(lambda: describe_state(child.pid) == "sleeping (state S)")
        child.send_signal(signal.SIGSTOP)
        wait_for(lambda: describe_state(child.pid) == "stopped (state T)")
    finally:
        child.kill()
    wait_for(lambda: describe_state(child.pid) == "ended, but not yet gone (state Z)")
    child.wait()
    assert describe_state(child.pid) == "gone"
