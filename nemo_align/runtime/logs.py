"""The log of a run: one logger, `nemo_align`, whose lines go to stderr and, on rank 0, to <run_dir>/log.txt."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TextIO

LOGGER_NAME = "nemo_align"


class _CurrentStderr(logging.StreamHandler):
    """Writes to whatever sys.stderr is at the moment: a progress display may have put itself in its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _LogFile(logging.FileHandler):
    """log.txt. A disk that is full costs lines of it, not the run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self._warned = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._warned:
            self._warned = True
            with suppress(OSError):  # stderr may lie on the same disk
                print(
                    f"warning: {self.baseFilename} cannot be written ({error.strerror}): lines will be missing from it",
                    file=sys.stderr,
                    flush=True,
                )

    def close(self) -> None:
        with suppress(OSError):  # it tries once more to write what did not fit
            super().close()


def setup(run_dir: str | Path, rank: int, *, shared_stderr: bool = False) -> logging.Logger:
    """Set up and return the logger. A second call replaces the first.

    Args:
        run_dir: the run's directory; rank 0 appends to log.txt in it.
        rank: of this process; lines of other ranks than 0 name theirs.
        shared_stderr: the ranks write to one stderr (torchrun, srun), so others than 0 only say warnings and errors.

    Raises:
        ValueError: log.txt cannot be opened.
    """
    logger = logging.getLogger(LOGGER_NAME)
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.INFO)
    logger.propagate = False  # else a root handler set by a library prints every line twice

    who = "" if rank == 0 else f"[rank {rank}] "
    to_stderr = _CurrentStderr()
    to_stderr.setFormatter(logging.Formatter(f"%(asctime)s {who}%(message)s", datefmt="%H:%M:%S"))
    to_stderr.setLevel(logging.WARNING if rank > 0 and shared_stderr else logging.INFO)
    logger.addHandler(to_stderr)
    if rank == 0:
        path = Path(run_dir) / "log.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            to_file = _LogFile(path)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be written ({error.strerror}): make room there, or set run_dir to a folder that can be "
                "written"
            ) from None
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(to_file)
    return logger


def quiet_libraries() -> None:
    """Silence warnings that the user of a run can do nothing about: before Megatron and torch are imported.

    They speak to the developers of Megatron-core (deprecations inside it, kernels absent without a GPU) and would bury
    the lines that matter. Errors, and warnings of other packages, are left alone.
    """
    for module in (r"megatron\.", r"torch\.distributed\.", r"torch\.jit\.", r"torch\.autograd\."):
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=module)
