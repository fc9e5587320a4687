"""Starting the workers of one machine, and seeing to it that none is left behind.

The parent stays without torch: it starts processes, hands on signals, and waits. A worker that fails ends the others;
a parent that dies, by whatever signal, takes its workers along (`parent_death`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from nemo_align.runtime import exit_codes
from nemo_align.runtime.launch_environment import LOCAL_VARIABLES
from nemo_align.runtime.parent_death import die_with_parent
from nemo_align.runtime.signals import STOP_SIGNALS

_POLL_SECONDS = 0.05
_OWN_END_SECONDS = 5.0  # after a failure the others may meet the same error, and should say so themselves
_TERMINATE_SECONDS = 10.0  # from SIGTERM to SIGKILL
_LAST_LINES = 30
_FORWARDED = (*STOP_SIGNALS, signal.SIGINT)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
# What another launcher around us may have set: our workers are not its ranks.
_FOREIGN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen
    log: Path | None  # None: rank 0, which writes to the terminal
    log_start: int  # size of the log before this launch, which appends
    code: int | None = None  # Popen's return code once it has ended

    @property
    def failed(self) -> bool:
        return self.code not in (None, exit_codes.SUCCESS, exit_codes.STOPPED_AFTER_SAVING)


def number_of_gpus(variables: Mapping[str, str] = os.environ) -> int:
    """GPUs that workers on this machine will see: those of nvidia-smi, less what CUDA_VISIBLE_DEVICES hides."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False)
    if listing.returncode != 0:  # the tool without a driver
        return 0
    present = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    chosen = [entry.strip() for entry in visible.split(",")]
    if "-1" in chosen:  # CUDA stops reading there
        chosen = chosen[: chosen.index("-1")]
    return min(present, sum(bool(entry) for entry in chosen))


def launch(argv: list[str], num_workers: int, log_dir: str | Path, env: Mapping[str, str] | None = None) -> int:
    """Run `argv` as `num_workers` ranks on this machine and wait for them. Main thread only.

    Rank 0 writes to our stdout and stderr, rank n to <log_dir>/rank_<n>.txt. SIGTERM, SIGUSR1 and SIGINT are handed on.
    When a worker fails, its rank and last lines are printed and the others are ended.

    Args:
        argv: the worker's command; it reads its rank by `launch_environment.detect()`, and until it calls
            `StopRequest.install()` SIGTERM and SIGUSR1 wait.
        num_workers: number of processes.
        log_dir: created if needed.
        env: environment of the workers (ours unless given).

    Returns:
        SUCCESS when all workers succeeded; STOPPED_AFTER_SAVING when a signal stopped them; INTERRUPTED after Ctrl-C;
        else the code of the worker that failed first (128 + signal number if a signal killed it).
    """
    log_dir = Path(log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    received: list[int] = []
    workers: list[_Worker] = []
    with tempfile.TemporaryDirectory(prefix="nemo_align_") as meeting_place, _collecting_signals(received):
        try:
            for rank in range(num_workers):
                variables = _worker_variables(env, rank, num_workers, f"file://{meeting_place}/store")
                workers.append(_start(argv, rank, log_dir, variables))
            return _supervise(workers, received)
        finally:
            _kill(workers)


def _worker_variables(env: Mapping[str, str] | None, rank: int, world_size: int, init_method: str) -> dict[str, str]:
    inherited = os.environ if env is None else env
    variables = {name: value for name, value in inherited.items() if name not in _FOREIGN_VARIABLES}
    threads = str(max(1, len(os.sched_getaffinity(0)) // world_size))
    for name in _THREAD_VARIABLES:
        variables.setdefault(name, threads)
    # Megatron-core overlaps tensor-parallel communication only if kernels are queued in the order of their launch.
    variables.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    place = (rank, world_size, rank, world_size, init_method)
    return variables | {name: str(value) for name, value in zip(LOCAL_VARIABLES, place, strict=True)}


def _start(argv: list[str], rank: int, log_dir: Path, variables: dict[str, str]) -> _Worker:
    log = log_dir / f"rank_{rank}.txt" if rank > 0 else None
    output = open(log, "ab") if log is not None else None  # noqa: SIM115  # closed below, once the worker has it
    try:
        process = subprocess.Popen(
            argv,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            # A group of its own: Ctrl-C reaches the parent alone, and what the worker started can be ended with it.
            process_group=0,
            preexec_fn=partial(_prepare_worker, os.getpid()),
        )
        return _Worker(rank, process, log, output.tell() if output is not None else 0)
    finally:
        if output is not None:
            output.close()


def _prepare_worker(parent: int) -> None:
    """In the new process, before it becomes the worker."""
    die_with_parent(parent)
    # A stop that comes while Python starts waits for its handlers: StopRequest.install() lets the signals through.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


@contextmanager
def _collecting_signals(received: list[int]) -> Iterator[None]:
    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _supervise(workers: list[_Worker], received: list[int]) -> int:
    first_failure: _Worker | None = None
    interrupted = False
    terminate_at = kill_at = float("inf")
    while any(worker.code is None for worker in workers):
        while received:
            number = received.pop(0)
            if number == signal.SIGINT:
                # A second Ctrl-C is an impatient one.
                kill_at = time.monotonic() + (0.0 if interrupted else _TERMINATE_SECONDS)
                interrupted = True
            _send(workers, number)
        for worker in workers:
            if worker.code is None and _ended(worker) and worker.failed and first_failure is None:
                first_failure = worker
                terminate_at = time.monotonic() + _OWN_END_SECONDS
        now = time.monotonic()
        if now >= terminate_at:
            _send(workers, signal.SIGTERM)
            terminate_at, kill_at = float("inf"), min(kill_at, now + _TERMINATE_SECONDS)
        if now >= kill_at:
            _kill(workers)
        time.sleep(_POLL_SECONDS)
    if interrupted:
        return exit_codes.INTERRUPTED
    if first_failure is not None:
        _report(first_failure, workers)
        assert first_failure.code is not None
        return first_failure.code if first_failure.code > 0 else 128 - first_failure.code
    stopped = any(worker.code == exit_codes.STOPPED_AFTER_SAVING for worker in workers)
    return exit_codes.STOPPED_AFTER_SAVING if stopped else exit_codes.SUCCESS


def _ended(worker: _Worker) -> bool:
    """Whether the worker has ended; then its code is noted and, if it failed, what it started is ended too."""
    pid = worker.process.pid
    # WNOWAIT: the process stays a zombie, so its group's number cannot go to somebody else before we use it.
    result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if result is None:
        return False
    if result.si_code != os.CLD_EXITED or result.si_status not in (exit_codes.SUCCESS, exit_codes.STOPPED_AFTER_SAVING):
        os.killpg(pid, signal.SIGKILL)
    worker.code = worker.process.wait()
    return True


def _send(workers: list[_Worker], number: int) -> None:
    for worker in workers:
        if worker.code is None:
            os.kill(worker.process.pid, number)


def _kill(workers: list[_Worker]) -> None:
    """End the workers that are left and the processes that they started."""
    for worker in workers:
        if worker.code is None:
            os.killpg(worker.process.pid, signal.SIGKILL)
            worker.code = worker.process.wait()


def _report(failure: _Worker, workers: list[_Worker]) -> None:
    """Say on stderr which worker failed and what it said last."""
    if failure.code == exit_codes.USER_ERROR and workers[0].code == exit_codes.USER_ERROR:
        return  # rank 0 met the same and has said it on the terminal
    assert failure.code is not None
    how = f"exit code {failure.code}"
    if failure.code < 0:
        how = f"signal {signal.Signals(-failure.code).name}"
        if failure.code == -signal.SIGKILL:
            how += " (the kernel does this when memory runs out)"
    lines = [f"worker {failure.rank} of {len(workers)} ended with {how}"]
    if failure.log is not None:
        with open(failure.log, "rb") as log:
            log.seek(failure.log_start)
            said = log.read().decode(errors="replace").splitlines()[-_LAST_LINES:]
        lines[0] += f"; the last lines of {failure.log}:" if said else f"; {failure.log} says nothing"
        lines += [f"  {line}" for line in said]
    print("\n".join(lines), file=sys.stderr, flush=True)
