"""A run that stands still ends itself, and says where every rank was.

The main thread says what it does (`beat`) in loops and before long pieces of work. A thread of its own looks on: after
`runtime.hang_timeout_minutes` without a beat it writes the stacks of all threads to <run_dir>/hang/rank_<n>.txt, waits
until the other ranks have written theirs, and ends the process with `exit_codes.HUNG`. A rank without a file is the
one that the others wait for: the lowest rank that answers names it, with its host.

While nothing is wrong the ranks exchange nothing, so 6,144 of them cost as much as one, and no frozen store or file
system can freeze the thread. It runs while the main thread sits in a collective or in a kernel's wait, which let go of
the interpreter's lock. Where C code keeps the lock the thread cannot run; then a timer of the kernel, which the thread
would have put off, sends SIGALRM: faulthandler writes the stacks to stderr without the lock and the process ends.

Imports no torch: the watch begins before it is imported.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nemo_align.runtime import exit_codes, starts
from nemo_align.runtime.logs import LOGGER_NAME

logger = logging.getLogger(LOGGER_NAME)

FOLDER = "hang"
# Names a file; the lowest rank that answers adds a line to it. srun's exit code cannot tell a hang: it is that of the
# frozen rank, which had to be killed. slurm/train.sbatch looks here.
NOTE_VARIABLE = "NEMO_ALIGN_HANG_NOTE"
_FILE = re.compile(r"rank_(\d+)\.txt")
_POLL_SECONDS = 1.0
_START_SECONDS = 300.0  # a shorter timeout begins once the ranks have met: imports from a cold disk take minutes
_ANSWER_SECONDS = 5.0  # for the stacks of the other ranks
_LEAVE_SECONDS = 12.0  # from the first sign of a hang to the end, whatever the file system or the terminal do meanwhile
_KERNEL_SECONDS = 15.0  # the kernel's timer comes that much later than the thread would
_MOST_NAMED = 32


class Watchdog:
    """The watch over one process. Times in seconds."""

    def __init__(self, run_dir: str | Path, rank: int, world_size: int, timeout: float) -> None:
        assert timeout > 0, timeout
        self.folder = Path(run_dir) / FOLDER
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.places = [""] * world_size  # where each rank runs, once the ranks have met
        self.places[rank] = place()
        self._met = False
        self._doing = "starting"
        self._beats = 0
        self._poll = min(_POLL_SECONDS, timeout / 20)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin the watch. Main thread only."""
        own = self._file(self.rank)
        if own.exists():  # of an earlier start; a file without "earlier" in its name is an answer to this one
            own.replace(own.with_suffix(".earlier.txt"))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.register(signal.SIGALRM, file=2, all_threads=True, chain=True)
        self._put_off_kernel()
        self._thread.start()

    def know(self, places: Sequence[str]) -> None:
        """The ranks have met, at `places`."""
        self.places = list(places)
        self._met = True
        self._put_off_kernel()  # with the shorter limit
        self.beat("the ranks have met")

    def beat(self, doing: str) -> None:
        """The main thread goes on; `doing`: with what."""
        self._doing = doing
        self._beats += 1

    def stop(self) -> None:
        """End the watch."""
        self._ended.set()
        self._thread.join()
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.unregister(signal.SIGALRM)

    def _watch(self) -> None:
        seen, silent, before = -1, 0.0, time.monotonic()
        while not self._ended.wait(self._poll):
            self._put_off_kernel()
            now = time.monotonic()
            if self._beats != seen:
                seen, silent = self._beats, 0.0
            else:
                # A process that was stopped and goes on (scontrol suspend) was not hanging meanwhile.
                silent += min(now - before, 2 * self._poll)
            before = now
            # Ranks beat at different moments. Once one has given up, those that wait for the same thing answer too.
            limit = self._limit()
            if silent >= limit or (silent >= limit / 2 and self._answers() - {self.rank}):
                self._give_up(silent)

    def _limit(self) -> float:
        return self.timeout if self._met else max(self.timeout, _START_SECONDS)

    def _put_off_kernel(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._limit() + _KERNEL_SECONDS)

    def _give_up(self, silent: float) -> None:
        # A second thread, because each line below may block: a file system that is gone, a lock of the logger that the
        # main thread holds, a terminal that nobody reads.
        threading.Thread(target=self._leave_after, args=(_LEAVE_SECONDS,), daemon=True).start()
        head = (
            f"rank {self.rank} of {self.world_size} ({place()}) made no progress for {silent:.0f} s; "
            f"it was last at: {self._doing}"
        )
        path = self._file(self.rank)
        try:
            self._dump(path, head)
            logger.error("%s; stacks: %s", head, path)
        except OSError as error:
            logger.error("%s; %s cannot be written (%s), so the stacks follow", head, path, error)
            faulthandler.dump_traceback(file=2, all_threads=True)
        time.sleep(_ANSWER_SECONDS)
        try:
            answers = self._answers() | {self.rank}
            if self.rank == min(answers):
                verdict = self._verdict(answers)
                logger.error("%s", verdict)
                starts.ended(self.folder.parent, exit_codes.HUNG, f"{head}; {verdict}")
                self._leave_note(f"{head}; {verdict}")
        finally:
            _end(self._children())

    def _dump(self, path: Path, head: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(f"{head}\n\n")
            stream.flush()
            faulthandler.dump_traceback(file=stream, all_threads=True)

    def _answers(self) -> set[int]:
        """Ranks that have written their stacks."""
        try:
            names = os.listdir(self.folder)
        except OSError:
            return set()
        found = (_FILE.fullmatch(name) for name in names)
        return {rank for match in found if match and (rank := int(match[1])) < self.world_size}

    def _verdict(self, answers: set[int]) -> str:
        silent = [rank for rank in range(self.world_size) if rank not in answers]
        if not silent:
            return f"all {self.world_size} ranks answer: compare their stacks in {self.folder}"
        named = [f"{rank} ({self.places[rank] or 'never met'})" for rank in silent[:_MOST_NAMED]]
        more = f" and {len(silent) - _MOST_NAMED} more" if len(silent) > _MOST_NAMED else ""
        return f"no answer from rank{'s' if len(silent) > 1 else ''} {', '.join(named)}{more}"

    def _leave_note(self, text: str) -> None:
        if path := os.environ.get(NOTE_VARIABLE):
            with open(path, "a", encoding="utf-8") as note:
                note.write(f"{text}\n")

    def _leave_after(self, seconds: float) -> None:
        time.sleep(seconds)
        _end([])

    def _children(self) -> list[int]:
        """Processes that this one started, by number."""
        found = []
        for path in Path("/proc/self/task").glob("*/children"):
            found += [int(number) for number in path.read_text().split()]
        return found

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.txt"


def place() -> str:
    """Where this process runs: for a person who goes to look for it."""
    return f"host {socket.gethostname()}, pid {os.getpid()}"


def _end(children: Sequence[int]) -> None:
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(exit_codes.HUNG)  # the main thread is stuck: nothing that it holds can be put in order


_watchdog: Watchdog | None = None


def start(run_dir: str | Path, rank: int, world_size: int, timeout: float) -> None:
    """Watch this process from now on; `timeout` in seconds, 0: do not. Main thread only."""
    global _watchdog
    if timeout > 0:
        _watchdog = Watchdog(run_dir, rank, world_size, timeout)
        _watchdog.start()


def beat(doing: str) -> None:
    """Say that the main thread goes on, and with what. Costs less than a microsecond; without a watch, nothing."""
    if _watchdog is not None:
        _watchdog.beat(doing)


def know(places: Sequence[str]) -> None:
    """Tell the watch that the ranks have met, and where each runs (`place()`), so that it can name a silent one's."""
    if _watchdog is not None:
        _watchdog.know(places)


def stop() -> None:
    """End the watch, if there is one."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None
