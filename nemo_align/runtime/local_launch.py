"""Starting the workers of one machine, and seeing to it that none is left behind.

The parent stays without torch: it starts processes, hands on signals, and waits. A worker that fails ends the others;
a parent that dies, by whatever signal, takes its workers along (`parent_death`). Workers that a signal killed, or that
ended themselves because they made no progress (`watchdog`), are started again and resume.
"""

from __future__ import annotations

import hashlib
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
from nemo_align.runtime.process_state import STOPPED, StoppedClock, describe_state, state_letter
from nemo_align.runtime.restarts import Restarts
from nemo_align.runtime.signals import STOP_SIGNALS

_POLL_SECONDS = 0.05
_OWN_END_SECONDS = 5.0  # after a failure the others may meet the same error, and should say so themselves
_TERMINATE_SECONDS = 10.0  # from SIGTERM to SIGKILL
# After a worker has given up for want of progress: the others, which began to wait a little later, write their stacks.
_ANSWER_SECONDS = 20.0
_LOOK_SECONDS = 0.5  # between two looks at the states of the workers
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
    def hung(self) -> bool:
        """Whether its watchdog ended it: the thread, or the kernel's timer behind the thread."""
        return self.code in (exit_codes.HUNG, -signal.SIGALRM)

    @property
    def failed(self) -> bool:
        return self.code not in (None, exit_codes.SUCCESS, exit_codes.STOPPED_AFTER_SAVING)


@dataclass(frozen=True)
class _Outcome:
    """How the workers of one start ended. `mishap`: what a restart may mend; None if none would, or none is wanted."""

    code: int
    mishap: str | None = None


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


def launch(
    argv: list[str],
    num_workers: int,
    log_dir: str | Path,
    env: Mapping[str, str] | None = None,
    *,
    run_dir: str | Path | None = None,
    max_restarts: int = 0,
    hang_seconds: float = 0.0,
) -> int:
    """Run `argv` as `num_workers` ranks on this machine and wait for them. Main thread only.

    Rank 0 writes to our stdout and stderr, rank n to <log_dir>/rank_<n>.txt. SIGTERM, SIGUSR1 and SIGINT are handed on.
    When a worker fails, its rank and last lines are printed and the others are ended. When one ends with HUNG, the
    others have time to do so too; those that do not are named with their state and killed.

    Args:
        argv: the worker's command; it reads its rank by `launch_environment.detect()`, and until it calls
            `StopRequest.install()` SIGTERM and SIGUSR1 wait.
        num_workers: number of processes.
        log_dir: created if needed.
        env: environment of the workers (ours unless given).
        run_dir: where the workers save what they resume from; needed for restarts.
        max_restarts: how often all workers are started again, without progress in between, after a worker was killed
            by a signal or ended with HUNG; never after a signal to us, an error, or a mistake of the user.
        hang_seconds: a worker that is stopped (SIGSTOP) for so long, and for the time that the others' watchdogs need
            to notice it first, counts as hung; 0: it may be stopped for ever.

    Returns:
        SUCCESS when all workers succeeded; STOPPED_AFTER_SAVING when a signal stopped them; INTERRUPTED after Ctrl-C;
        HUNG when they made no progress; else the code of the worker that failed first (128 + signal number if a signal
        killed it).
    """
    log_dir = Path(log_dir)
    log_dir.mkdir(parents=True, exist_ok=True)
    received: list[int] = []
    with _collecting_signals(received):
        restarts = Restarts(run_dir, max_restarts)
        while True:
            outcome = _run_workers(argv, num_workers, log_dir, env, received, hang_seconds)
            # A signal that came after the last worker's end asks for no new start either.
            if outcome.mishap is None or received:
                return outcome.code
            announcement = restarts.next(outcome.mishap)
            if announcement is None:
                if restarts.exhausted:
                    _say(f"given up after {max_restarts} restarts without progress in between (runtime.max_restarts)")
                return outcome.code
            _say(announcement)


def _run_workers(
    argv: list[str],
    num_workers: int,
    log_dir: Path,
    env: Mapping[str, str] | None,
    received: list[int],
    hang_seconds: float,
) -> _Outcome:
    workers: list[_Worker] = []
    with _meeting_place(log_dir) as meeting_place:
        try:
            for rank in range(num_workers):
                variables = _worker_variables(env, rank, num_workers, f"file://{meeting_place}/store")
                workers.append(_start(argv, rank, log_dir, variables))
            return _supervise(workers, received, hang_seconds)
        finally:
            _kill(workers)


@contextmanager
def _meeting_place(log_dir: Path) -> Iterator[str]:
    """A folder on this machine's own disk where the workers find each other. Those that commands of the same run left
    when they were killed are removed: their names tell the run, and a run has one command at a time."""
    run = hashlib.blake2b(os.fsencode(log_dir.resolve()), digest_size=6).hexdigest()
    prefix = f"nemo_align_{run}_"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        yield folder


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


def _supervise(workers: list[_Worker], received: list[int], hang_seconds: float) -> _Outcome:
    first_failure: _Worker | None = None
    asked = interrupted = False
    terminate_at = kill_at = name_at = float("inf")
    stopped, looked = StoppedClock(most=2 * _LOOK_SECONDS), time.monotonic()
    silent: list[_Worker] = []
    while any(worker.code is None for worker in workers):
        while received:
            number = received.pop(0)
            asked = True
            if number == signal.SIGINT:
                # A second Ctrl-C is an impatient one.
                kill_at = time.monotonic() + (0.0 if interrupted else _TERMINATE_SECONDS)
                interrupted = True
            _send(workers, number)
        for worker in workers:
            if worker.code is None and _ended(worker) and worker.failed and first_failure is None:
                first_failure = worker
                if worker.hung:
                    name_at = time.monotonic() + _ANSWER_SECONDS
                else:
                    terminate_at = time.monotonic() + _OWN_END_SECONDS
        now = time.monotonic()
        if hang_seconds and now - looked >= _LOOK_SECONDS:
            running = [worker.process.pid for worker in workers if worker.code is None]
            if stopped.look(running, now - looked) >= hang_seconds + _ANSWER_SECONDS:
                name_at = now
            looked = now
        if now >= name_at:
            silent = _name_silent(workers)
            name_at, kill_at = float("inf"), now
        if now >= terminate_at:
            _send(workers, signal.SIGTERM)
            terminate_at, kill_at = float("inf"), min(kill_at, now + _TERMINATE_SECONDS)
        if now >= kill_at:
            _kill(workers)
        time.sleep(_POLL_SECONDS)
    if interrupted:
        return _Outcome(exit_codes.INTERRUPTED)
    if first_failure is not None:
        _report(first_failure, workers)
    culprit = (silent or [first_failure])[0]
    if culprit is not None:
        return _outcome(culprit, hung=bool(silent), restart=not asked)
    saved = any(worker.code == exit_codes.STOPPED_AFTER_SAVING for worker in workers)
    return _Outcome(exit_codes.STOPPED_AFTER_SAVING if saved else exit_codes.SUCCESS)


def _outcome(culprit: _Worker, *, hung: bool, restart: bool) -> _Outcome:
    """`hung`: the culprit did not answer and had to be killed."""
    code = culprit.code
    assert code is not None
    if hung or culprit.hung:
        code = exit_codes.HUNG
        mishap = f"worker {culprit.rank} {'did not answer' if hung else 'made no progress'}"
    elif code < 0:
        code, mishap = 128 - code, f"worker {culprit.rank} was killed by {signal.Signals(-code).name}"
    else:
        return _Outcome(code)
    return _Outcome(code, mishap if restart else None)


def _name_silent(workers: list[_Worker]) -> list[_Worker]:
    """Say on stderr which workers neither go on nor end, and what the kernel says of them.

    Where some are stopped, the others may just be waiting for these.
    """
    running = [worker for worker in workers if worker.code is None]
    silent = [worker for worker in running if state_letter(worker.process.pid) in STOPPED] or running
    for worker in silent:
        text = f"worker {worker.rank} of {len(workers)} does not answer: {describe_state(worker.process.pid)}"
        said = _last_lines(worker)
        _say(text + (f", last known: {said[-1]}" if said else ""))
    return silent


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
    how = f"exit code {failure.code}" + (" (no progress)" if failure.hung else "")
    if failure.code < 0:
        how = f"signal {signal.Signals(-failure.code).name}"
        if failure.code == -signal.SIGKILL:
            how += " (the kernel does this when memory runs out)"
    lines = [f"worker {failure.rank} of {len(workers)} ended with {how}"]
    if failure.log is not None:
        said = _last_lines(failure)
        lines[0] += f"; the last lines of {failure.log}:" if said else f"; {failure.log} says nothing"
        lines += [f"  {line}" for line in said]
    _say("\n".join(lines))


def _last_lines(worker: _Worker) -> list[str]:
    """What the worker wrote last; nothing of rank 0, which wrote to the terminal."""
    if worker.log is None:
        return []
    with open(worker.log, "rb") as log:
        log.seek(worker.log_start)
        return log.read().decode(errors="replace").splitlines()[-_LAST_LINES:]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
