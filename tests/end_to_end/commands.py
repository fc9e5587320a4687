"""Running the real command as a user would, in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from nemo_align.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent.parent


def environment() -> dict[str, str]:
    """This process' environment, with the checkout importable and one thread per worker."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "nemo_align.cli", *arguments]


def run(*arguments: str, cwd: Path, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run `nemo-align arguments` to its end; output is kept."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


def run_until_step(
    step: int, *arguments: str, cwd: Path, run_dir: Path, kill_with: signal.Signals, timeout: float = 240.0
) -> int:
    """Start `nemo-align arguments`, send a signal to it once `step` is logged, and return its exit code."""
    process = subprocess.Popen(
        command(*arguments), cwd=cwd, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise AssertionError(f"the run ended with {process.returncode} before step {step}")
            if any(record["kind"] == "train" and record["step"] >= step for record in read_metrics(run_dir)):
                process.send_signal(kill_with)
                return process.wait(timeout=60)
            time.sleep(0.02)
        raise AssertionError(f"step {step} did not come within {timeout} s")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
