"""The watchdog in real processes without torch, where a missed beat shows within seconds."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nemo_align.runtime import exit_codes, watchdog

ROOT = Path(__file__).resolve().parents[3]
PRELUDE = """
import ctypes, logging, os, signal, sys, time
from nemo_align.runtime import logs, watchdog
run_dir, rank, world_size, timeout = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
watchdog._ANSWER_SECONDS = 1.5
watchdog._KERNEL_SECONDS = 4.0
logs.setup(run_dir, rank)
watchdog.start(run_dir, rank, world_size, timeout)
watchdog.know([f"host node{n}, pid {n}" for n in range(world_size)])
"""


@pytest.fixture
def start(tmp_path):
    """Starts ranks of a run in tmp_path/run whose body is the given code."""
    processes = []

    def begin(body: str, *, rank: int = 0, world_size: int = 1, timeout: float = 1.0, **variables: str):
        script = tmp_path / f"rank_{rank}.py"
        script.write_text(PRELUDE + textwrap.dedent(body))
        argv = [sys.executable, str(script), str(tmp_path / "run"), str(rank), str(world_size), str(timeout)]
        process = subprocess.Popen(
            argv, env=os.environ | {"PYTHONPATH": str(ROOT)} | variables, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()


def outcome(process: subprocess.Popen) -> tuple[int, str]:
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_silence_shows_the_stacks_and_ends_the_process(start, tmp_path):
    process = start("""
        def waits_here():
            time.sleep(60)
        watchdog.beat("step 7")
        waits_here()
    """)
    code, said = outcome(process)
    assert code == exit_codes.HUNG
    stacks = (tmp_path / "run" / "hang" / "rank_0.txt").read_text()
    head = r"rank 0 of 1 \(host .+, pid \d+\) made no progress for \d+ s; it was last at: step 7\n"
    assert re.match(head, stacks), stacks
    assert "in waits_here" in stacks
    assert "it was last at: step 7" in said
    assert "all 1 ranks answer" in said
    assert "it was last at: step 7" in (tmp_path / "run" / "log.txt").read_text()


def test_beats_keep_a_process_alive_and_the_end_of_the_watch_ends_both_lines_of_defence(start, tmp_path):
    process = start("""
        for number in range(30):
            watchdog.beat(f"step {number}")
            time.sleep(0.1)
        watchdog.stop()
        time.sleep(2.5)
    """)
    assert outcome(process) == (0, "")
    assert not (tmp_path / "run" / "hang").exists()


def test_the_lowest_rank_that_answers_names_the_others(start, tmp_path):
    (tmp_path / "run" / "hang").mkdir(parents=True)
    for rank in (0, 3, 4):  # of an earlier start: rank 0's is put aside by rank 0 itself, rank 4 is no rank any more
        (tmp_path / "run" / "hang" / f"rank_{rank}.txt").write_text("earlier\n")
    note = tmp_path / "note"
    start("os.kill(os.getpid(), signal.SIGSTOP)", rank=0, world_size=4, timeout=3.0)
    start("watchdog.beat('save'); os.kill(os.getpid(), signal.SIGSTOP)", rank=3, world_size=4, timeout=3.0)
    waiting = "watchdog.beat('step 3'); time.sleep({}); watchdog.beat('step 4'); time.sleep(60)"
    ranks = [
        start(waiting.format(0.1), rank=1, world_size=4, timeout=3.0, NEMO_ALIGN_HANG_NOTE=str(note)),
        start(waiting.format(0.7), rank=2, world_size=4, timeout=3.0, NEMO_ALIGN_HANG_NOTE=str(note)),
    ]
    (code_1, said_1), (code_2, said_2) = map(outcome, ranks)
    assert code_1 == code_2 == exit_codes.HUNG
    verdict = "no answer from ranks 0 (host node0, pid 0), 3 (host node3, pid 3)"
    assert said_1.endswith(f"[rank 1] {verdict}\n")
    assert "no answer" not in said_2
    assert verdict in note.read_text()
    assert note.read_text().count("\n") == 1
    assert (tmp_path / "run" / "hang" / "rank_0.earlier.txt").read_text() == "earlier\n"


def test_time_in_which_the_process_itself_was_stopped_does_not_count(start):
    process = start(
        """
        watchdog.beat("step 1")
        print("ready", file=sys.stderr, flush=True)
        time.sleep(2.2)
        watchdog.stop()
        """,
        timeout=4.0,
    )
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=4.5)  # longer than the timeout, shorter than the kernel's timer
    process.send_signal(signal.SIGCONT)
    assert outcome(process) == (0, "")


def test_code_that_keeps_the_interpreter_s_lock_is_ended_by_the_kernel(start):
    process = start("""
        def keeps_the_lock():
            ctypes.PyDLL(None).sleep(60)
        watchdog.beat("step 1")
        keeps_the_lock()
    """)
    code, said = outcome(process)
    assert code == -signal.SIGALRM
    assert "in keeps_the_lock" in said


def test_a_hang_ends_even_if_the_stacks_cannot_be_written(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "hang").write_text("no folder")
    process = start("time.sleep(60)")
    code, said = outcome(process)
    assert code == exit_codes.HUNG
    assert "cannot be written" in said
    assert "most recent call first" in said


def test_a_log_that_blocks_does_not_keep_a_hung_process(start, tmp_path):
    process = start("""
        watchdog._LEAVE_SECONDS = 1.0
        logging.getLogger("nemo_align").handlers[0].acquire()  # the main thread hangs while it writes a line
        time.sleep(60)
    """)
    code, said = outcome(process)
    assert (code, said) == (exit_codes.HUNG, "")
    assert "most recent call first" in (tmp_path / "run" / "hang" / "rank_0.txt").read_text()


def test_what_a_hung_process_started_ends_with_it(start, tmp_path):
    process = start("""
        import subprocess
        child = subprocess.Popen(["sleep", "60"])
        print(child.pid, file=sys.stderr, flush=True)
        time.sleep(60)
    """)
    child = int(process.stderr.readline())
    assert outcome(process)[0] == exit_codes.HUNG
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_without_a_watch_nothing_happens():
    watchdog.start("nowhere", 0, 1, 0.0)
    watchdog.beat("step 1")
    watchdog.know(["here"])
    watchdog.stop()
    assert not Path("nowhere").exists()
