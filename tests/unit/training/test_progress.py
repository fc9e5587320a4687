"""Progress: plain lines where nobody watches, one live line on a terminal, an honest time left."""

import io
import logging
import sys

import pytest
from rich.console import Console

from nemo_align.runtime import logs
from nemo_align.training import progress as module
from nemo_align.training.progress import Progress, clock

METRICS = {"loss": 2.34567, "grad_norm": 1.25, "lr": 1e-4, "perf/mfu": 0.4242, "perf/tokens_per_second_per_gpu": 1234.5}


@pytest.fixture
def seconds(monkeypatch):
    """A clock that the test turns."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def piped() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=160)


def test_plain_lines_every_so_many_steps_and_at_the_end(caplog):
    caplog.set_level(logging.INFO, logger="nemo_align")
    with Progress("sft", 7, log_every=3, console=piped()) as progress:
        for step in range(1, 8):
            progress.update(step, METRICS)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[1] for line in lines] == ["3/7", "6/7", "7/7"]
    assert "loss 2.3457  grad norm 1.25  lr 1.00e-04  tokens/s/gpu 1,234  MFU 42.4%" in lines[0]


def test_time_left_is_steps_times_seconds_and_ignores_pauses(seconds):
    progress = Progress("sft", 100, start=10, console=piped())
    with progress:
        assert progress.time_left() == "-"
        seconds[0] += 2
        progress.update(11)
        assert progress.time_left() == clock(2 * 89)
        progress.pause()
        seconds[0] += 500  # a validation
        progress.resume()
        seconds[0] += 2
        progress.update(12)
        assert progress.time_left() == clock(2 * 88)


def test_a_terminal_gets_one_live_line_and_log_lines_pass_above_it(tmp_path, seconds):
    console = terminal()
    logger = logs.setup(tmp_path, rank=0)
    before = sys.stderr
    try:
        with Progress("dpo", 4, console=console) as progress:
            for step in range(1, 5):
                seconds[0] += 1
                progress.update(step, METRICS)
            logger.warning("a log line")
        assert sys.stderr is before
    finally:
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
        logger.propagate = True
    shown = console.file.getvalue()
    assert "4/4" in shown and "MFU 42.4%" in shown and "a log line" in shown
    assert (tmp_path / "log.txt").read_text().count("dpo") == 0  # the live line is not written to the log


def test_redraws_are_thinned_out(seconds):
    console = terminal()
    with Progress("fast", 1000, console=console) as progress:
        for step in range(1, 1000):
            seconds[0] += 0.001  # a step takes a millisecond
            progress.update(step, METRICS)
    assert console.file.getvalue().count("MFU") <= 6  # 1 s of steps: 4 redraws, and the last on closing


def test_other_ranks_say_nothing(caplog):
    with caplog.at_level(logging.INFO), Progress("sft", 2, enabled=False, console=piped()) as progress:
        progress.update(1, METRICS)
    assert caplog.records == []


@pytest.mark.parametrize(("value", "text"), [(0, "0:00"), (12.4, "0:12"), (3725, "1:02:05")])
def test_clock(value, text):
    assert clock(value) == text
