"""Starting the real command, watching how far it is, disturbing it, and starting it again."""

from __future__ import annotations

import contextlib
import re
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.end_to_end.commands import command, environment
from tests.faults import remains

TOKEN = "NEMO_ALIGN_FAULT_RUN"  # in the environment of everything that a run starts
POLL_SECONDS = 0.003
LOOK_SECONDS, LOOK_AGAIN_SECONDS = 0.25, 1.0  # between looks for ports: until some are found, and then
ATTEMPT_SECONDS = 900.0  # for a run of seconds: the machine may do much else; only a run that hangs takes so long
STEP = re.compile(r"INFO nemo_align: (?!reference |score )\S+ (\d+)/(\d+)  ")
_RESUMED = re.compile(r"resumed (\S+) at step (\d+) of \d+")


class Job:
    """One run directory and the command that fills it, started as often as it takes."""

    def __init__(self, arguments: Sequence[str], folder: Path, run_dir: Path | None = None) -> None:
        """`folder`: an existing one for the command's output and its temporary files; holds `run_dir` unless given."""
        self.folder = folder
        self.run_dir = run_dir or folder / "run"
        self.arguments = [*arguments, f"run_dir={self.run_dir}"]
        self.token = secrets.token_hex(8)
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.attempts: list[Attempt] = []

    def start(self, *extra: str) -> Attempt:
        attempt = Attempt(self, len(self.attempts), extra)
        self.attempts.append(attempt)
        return attempt

    def finish(self, *extra: str) -> Attempt:
        """Start the command and wait for its end."""
        attempt = self.start(*extra)
        attempt.wait()
        return attempt

    def processes(self) -> list[psutil.Process]:
        """Everything that the command started and that still lives, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(TOKEN) == self.token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def logs(self) -> list[Path]:
        """log.txt of the run, and of each stage if it is a pipeline."""
        return [path for path in (self.run_dir / "log.txt", *sorted(self.run_dir.glob("*/log.txt"))) if path.exists()]


class Attempt:
    """One start of a job's command."""

    def __init__(self, job: Job, number: int, extra: Sequence[str]) -> None:
        self.job = job
        self.output = job.folder / f"output_{number}.txt"
        self.known: set[remains.Identity] = set()  # processes that the run was seen to have
        self.sockets: set[int] = set()  # that they were seen to listen on, by inode
        self._next_look = 0.0
        self._offsets = {path: path.stat().st_size for path in job.logs()}
        self._lines: dict[Path, list[str]] = {}
        variables = {**environment(), TOKEN: job.token, "TMPDIR": str(job.temporary)}
        self.started = time.monotonic()
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(
                command(*job.arguments, *extra), cwd=job.folder, env=variables, stdout=output, stderr=output
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def said(self) -> str:
        """stdout and stderr of the command and of rank 0."""
        return self.output.read_text(errors="replace")

    def lines(self, stage: str = "") -> list[str]:
        """Lines of the log since this start: of one stage of a pipeline, or of everything in order of the stages."""
        for path in self.job.logs():
            offset = self._offsets.get(path, 0)
            with open(path, "rb") as stream:
                stream.seek(offset)
                new = stream.read()
            whole = new.rfind(b"\n") + 1
            if whole:
                self._offsets[path] = offset + whole
                self._lines.setdefault(path, []).extend(new[:whole].decode(errors="replace").splitlines())
        if stage:
            return self._lines.get(self.job.run_dir / stage / "log.txt", [])
        return [line for lines in self._lines.values() for line in lines]

    def steps(self, stage: str = "") -> list[int]:
        """Training steps since this start, or since the launcher's last restart within it."""
        found = [int(match[1]) for line in self.lines(stage) if (match := STEP.search(line))]
        begin = max((index for index in range(1, len(found)) if found[index] <= found[index - 1]), default=0)
        return found[begin:]

    def resumed(self, stage: str = "") -> tuple[Path, int] | None:
        """Checkpoint and step that this attempt went on from."""
        found = [match for line in self.lines(stage) if (match := _RESUMED.search(line))]
        return (Path(found[-1][1]), int(found[-1][2])) if found else None

    def ranks(self) -> dict[int, psutil.Process]:
        """The workers that live."""
        found = {}
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError):
                    rank = process.environ().get("NEMO_ALIGN_RANK")
                    if rank is not None and "nemo_align.worker" in process.cmdline():
                        found[int(rank)] = process
        return found

    def wait_until(self, reached: Callable[[Attempt], bool], timeout: float = ATTEMPT_SECONDS) -> bool:
        """Poll until `reached`; False if the command ended before."""
        deadline = time.monotonic() + timeout
        while not reached(self):
            if self.process.poll() is not None:
                return reached(self)
            if time.monotonic() > deadline:
                raise AssertionError(f"nothing after {timeout:g} s; the command said\n{self.said()[-4000:]}")
            if time.monotonic() >= self._next_look:
                self._look()
            time.sleep(POLL_SECONDS)
        return True

    def wait(self, timeout: float = ATTEMPT_SECONDS) -> int:
        """The exit code."""
        self.wait_until(lambda _: False, timeout)
        return self.process.returncode

    def trained(self) -> bool:
        """Whether this start, and not another one in the same folder, trained a step."""
        return STEP.search(self.said()) is not None

    def send(self, number: int) -> None:
        """Send a signal to the command alone."""
        if not self.sockets:
            self._look()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def strike(self, victim: str) -> list[int]:
        """SIGKILL `command`, `all` ranks or `rank <n>`; the ranks killed (the command's own end takes all along)."""
        if victim == "command":
            self.send(signal.SIGKILL)
            return []
        if not self.sockets:
            self._look()
        killed = []
        for rank, process in self.ranks().items():
            if victim in ("all", f"rank {rank}"):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    killed.append(rank)
        return killed

    def end(self) -> None:
        """Whatever happened in the test, leave nothing behind."""
        for process in self.job.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()

    def _look(self) -> None:
        """Note processes and ports. Whatever is killed first may have opened them late: hence again and again."""
        found = remains.identities(process.pid for process in self.job.processes())
        self.known |= found
        self.sockets |= remains.held_by(found) & remains.listening()
        self._next_look = time.monotonic() + (LOOK_AGAIN_SECONDS if self.sockets else LOOK_SECONDS)


@contextlib.contextmanager
def job(arguments: Sequence[str], folder: Path, run_dir: Path | None = None) -> Iterator[Job]:
    """A job whose processes are gone at the end of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = Job(arguments, folder, run_dir)
    try:
        yield opened
    finally:
        for attempt in opened.attempts:
            attempt.end()


@dataclass(frozen=True)
class Moment:
    """When to strike. `reached` is polled; then `delay` seconds pass."""

    name: str
    reached: Callable[[Attempt], bool]
    delay: float = 0.0

    def await_in(self, attempt: Attempt) -> bool:
        """Wait for it; False if the command ended before."""
        if not attempt.wait_until(self.reached):
            return False
        time.sleep(self.delay)
        return attempt.process.poll() is None
