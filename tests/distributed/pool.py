"""Persistent worker processes on gloo, shared by every test that needs several ranks.

    def sum_of_ranks(topology):          # top level of the test module
        ...
    def test_it(pool2):
        assert pool2.run(with_topology, sum_of_ranks, {"tensor": 2}) == [1, 1]

Each worker runs one thread and keeps its default process group; `with_topology` puts a grid on it and takes it off
again, so one pool serves all layouts of its size. Functions and classes are sent by the file they stand in, so test
modules need not be importable by name (pytest's importlib mode).
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import importlib.util
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parent.parent
_START_SECONDS = 180.0  # importing torch and Megatron on a busy machine
_GRACE_SECONDS = 10.0  # for the other ranks, once one has failed

environment = None  # in a worker: its LaunchEnvironment


class RemoteError(Exception):
    """One rank raised; the message holds its rank and traceback. `type_name` is the exception's class name."""

    def __init__(self, message: str, type_name: str) -> None:
        super().__init__(message)
        self.type_name = type_name


def with_topology(fn: Callable, parallel: dict[str, Any], *args: Any, seed: int = 1234, **kwargs: Any) -> Any:
    """In a worker: `fn(topology, *args, **kwargs)` on a grid with these ParallelConfig fields, taken off afterwards."""
    from nemo_align.config.runtime import ParallelConfig, RuntimeConfig
    from nemo_align.runtime import topology

    assert environment is not None, "with_topology runs inside a worker: pool.run(with_topology, fn, {...})"
    grid = topology.initialize(ParallelConfig(**parallel), RuntimeConfig(threads=1, seed=seed), environment)
    result = fn(grid, *args, **kwargs)
    # Not in a `finally`: it waits for all ranks, and after an error on one the others may never come.
    topology.shutdown_model_parallel()
    return result


class WorkerPool:
    """`world_size` processes, started at the first `run` and again after a failure that left ranks out of step."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._connections: list[multiprocessing.connection.Connection] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def run(self, fn: Callable, *args: Any, timeout: float = 180.0, **kwargs: Any) -> list[Any]:
        """Call `fn(*args, **kwargs)` on every rank and return the results by rank.

        Raises:
            RemoteError: a rank raised. If all did, the first rank's error is reported and the pool lives on.
            TimeoutError: ranks were silent for `timeout` seconds; they are named, and the pool is killed.
        """
        if not self._processes:
            self._start()
        request = _dumps((fn, args, kwargs))
        for connection in self._connections:
            connection.send_bytes(request)
        return self._collect(timeout)

    def close(self) -> None:
        """End the workers."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):  # a worker that died before it had a group
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.preload"])
        self._folder = tempfile.TemporaryDirectory(prefix="nemo_align_pool_")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, self._folder.name, theirs))
            with _environment_of_workers():
                process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._collect(_START_SECONDS)  # each worker says that it has joined the group

    def _collect(self, timeout: float) -> list[Any]:
        """One answer from every rank, or an error that names who raised, died or hung."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        silent = set(range(self.world_size))
        while silent and time.monotonic() < deadline:
            waiting = [self._connections[rank] for rank in silent]
            ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
            for rank in [rank for rank in silent if self._connections[rank] in ready]:
                try:
                    answers[rank] = _loads(self._connections[rank].recv_bytes())
                except EOFError:
                    answers[rank] = (False, ("WorkerDied", self._epitaph(rank)))
                silent.discard(rank)
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        failures = {rank: answer for rank, (succeeded, answer) in answers.items() if not succeeded}
        if failures:
            in_step = not silent and len({failures.get(rank, ("",))[0] for rank in range(self.world_size)}) == 1
            if not in_step or any(type_name == "WorkerDied" for type_name, _ in failures.values()):
                self.close()
            else:
                self.run(_take_grid_off)
            rank, (type_name, text) = next(iter(failures.items()))  # the first to answer: the others follow from it
            raise RemoteError(f"rank {rank} of {self.world_size} raised:\n{text}", type_name)
        if silent:
            stacks = self._stacks(silent)
            self.close()
            raise TimeoutError(f"ranks {sorted(silent)} of {self.world_size} were silent for {timeout:.0f} s\n{stacks}")
        return [answers[rank][1] for rank in range(self.world_size)]

    def _epitaph(self, rank: int) -> str:
        self._processes[rank].join(5)
        return f"the process died with exit code {self._processes[rank].exitcode}\n{self._output(rank)}"

    def _stacks(self, ranks: set[int]) -> str:
        for rank in ranks:
            os.kill(self._processes[rank].pid, signal.SIGUSR2)  # faulthandler writes the stacks to the output file
        time.sleep(1.0)
        return "\n".join(f"rank {rank}:\n{self._output(rank)}" for rank in sorted(ranks))

    def _output(self, rank: int) -> str:
        assert self._folder is not None
        text = (Path(self._folder.name) / f"rank_{rank}.txt").read_text(errors="replace")
        return "\n".join(text.splitlines()[-40:])


@contextlib.contextmanager
def _environment_of_workers() -> Iterator[None]:
    """The variables that the workers inherit: through the fork server, which starts with the first worker."""
    path = os.pathsep.join([str(_TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    wanted = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": path}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(rank: int, world_size: int, folder: str, connection: multiprocessing.connection.Connection) -> None:
    """Main function of a worker: answer calls until the pool goes away."""
    global environment
    from nemo_align.config.runtime import RuntimeConfig
    from nemo_align.runtime import device, topology
    from nemo_align.runtime.launch_environment import LaunchEnvironment
    from nemo_align.runtime.parent_death import die_with_parent

    os.setpgid(0, 0)  # what a test starts here (Megatron's own saves start a process) ends with the worker
    die_with_parent()  # the fork server, which lives as long as pytest
    output = open(Path(folder) / f"rank_{rank}.txt", "w", buffering=1)  # noqa: SIM115  # open as long as the worker
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    faulthandler.register(signal.SIGUSR2, file=output, all_threads=True)
    environment = LaunchEnvironment(rank, world_size, rank, world_size, f"file://{folder}/store", "local")
    device.install()
    topology.join(RuntimeConfig(threads=1, distributed_timeout_minutes=5.0), environment)
    connection.send_bytes(_dumps((True, None)))
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        try:
            fn, args, kwargs = _loads(request)
            answer = (True, fn(*args, **kwargs))
            reply = _dumps(answer)
        except BaseException as error:  # a test may exit or be interrupted: the pool wants to hear of that as well
            reply = _dumps((False, (type(error).__name__, traceback.format_exc())))
        connection.send_bytes(reply)


def _take_grid_off() -> None:
    from nemo_align.runtime import topology

    topology.shutdown_model_parallel()


class _Pickler(pickle.Pickler):
    """Sends functions and classes of test files as (module, file, name)."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, types.FunctionType | type):
            return None
        file = getattr(sys.modules.get(obj.__module__), "__file__", None)
        if file is None or _TESTS not in Path(file).resolve().parents or Path(file).samefile(__file__):
            return None
        if "<locals>" in obj.__qualname__:
            raise TypeError(f"{obj.__qualname__} must stand at the top level of {file}: workers find it by its name")
        return obj.__module__, str(Path(file).resolve()), obj.__qualname__


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, identity: Any) -> Any:
        module_name, file, qualified_name = identity
        found: Any = _module(module_name, file)
        for name in qualified_name.split("."):
            found = getattr(found, name)
        return found


def _module(name: str, file: str) -> types.ModuleType:
    """The module of this file, under the name it has in pytest: loaded by its path if nobody did so before."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before execution, as Python's own import does: dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _dumps(obj: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(obj)
    return buffer.getvalue()


def _loads(data: bytes) -> Any:
    return _Unpickler(io.BytesIO(data)).load()
