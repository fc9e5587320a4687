"""The run's log, and the note that a stop signal leaves."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_align.runtime import logs
from nemo_align.runtime.signals import StopRequest


@pytest.fixture(autouse=True)
def _put_back():
    logger = logging.getLogger(logs.LOGGER_NAME)
    before = (logger.handlers[:], logger.level, logger.propagate)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
    logger.handlers[:], logger.level, logger.propagate = before
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_rank_zero_writes_file_and_stderr_and_appends(tmp_path, capsys):
    logs.setup(tmp_path / "run", 0).info("first")
    logs.setup(tmp_path / "run", 0).warning("second")
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.split("nemo_align: ")[1] for line in lines] == ["first", "second"]
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()] == ["first", "second"]


def test_other_ranks_name_themselves_and_write_no_file(tmp_path, capsys):
    logger = logs.setup(tmp_path / "run", 3)
    logger.info("hello")
    assert capsys.readouterr().err.endswith("[rank 3] hello\n")
    assert not (tmp_path / "run").exists()


def test_on_a_shared_stderr_other_ranks_only_warn(tmp_path, capsys):
    logger = logs.setup(tmp_path, 3, shared_stderr=True)
    logger.info("chatter")
    logger.warning("trouble")
    assert capsys.readouterr().err.endswith("[rank 3] trouble\n")
    logs.setup(tmp_path, 0, shared_stderr=True).info("progress")
    assert "progress" in capsys.readouterr().err


def test_a_full_disk_costs_lines_and_one_warning(tmp_path, capsys):
    logger = logs.setup(tmp_path, 0)
    logger.info("first")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # bytes: room for no second line
    try:
        for number in range(300):
            logger.info("lost %d %s", number, "x" * 100)
        said = capsys.readouterr().err.splitlines()
        logs.setup(tmp_path / "elsewhere", 0)  # closes the file, with what it could not write
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len([line for line in said if " lost " in line]) == 300  # stderr shows them all
    [warning] = [line for line in said if " lost " not in line and not line.endswith(" first")]
    assert warning == f"warning: {tmp_path}/log.txt cannot be written (File too large): lines will be missing from it"
    assert (tmp_path / "log.txt").read_text().splitlines()[0].endswith("nemo_align: first")


def test_any_other_error_of_the_log_keeps_its_traceback(tmp_path, capsys):
    logs.setup(tmp_path, 0).info("%d", "no number")
    assert "Logging error" in capsys.readouterr().err


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(
        ValueError, match=r"log\.txt cannot be written \(Is a directory\): make room there, or set run_dir"
    ):
        logs.setup(tmp_path, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_is_noted_and_may_repeat(number):
    stop = StopRequest()
    stop.install()
    assert not stop.requested
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)
    assert stop.requested


@pytest.mark.parametrize("closed", [False, True])
def test_a_stop_signal_while_python_ends_changes_no_exit_code(closed):
    code = f"""if True:
        import os, signal
        from nemo_align.runtime.signals import StopRequest
        class Late:
            def __del__(self, kill=os.kill, own=os.getpid(), number=signal.SIGUSR1):
                kill(own, number)
        late = Late()  # goes when the modules do, after Python has taken its handlers away
        stop = StopRequest()
        stop.install()
        {"stop.close()" if closed else ""}
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False)
    assert ended.returncode == (0 if closed else -signal.SIGUSR1)
