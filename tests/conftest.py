"""Fixtures of all tests: pools of worker processes, started when a test first asks for one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Several processes share few cores: one thread each, and before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.bad_input_tally import tried
from tests.distributed.pool import WorkerPool
from tests.stage_inputs import StageInputs, make_stage_inputs


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many bad inputs were tried, for docs/guarantees.md."""
    if tried:
        kinds = ", ".join(f"{kind} {number:,}" for kind, number in tried.items())
        terminalreporter.write_line(f"bad inputs tried: {tried.total():,} ({kinds})")


def _pool(world_size: int) -> Iterator[WorkerPool]:
    pool = WorkerPool(world_size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pool1() -> Iterator[WorkerPool]:
    """One worker: for what must not leave process groups or the CPU facade behind in pytest's own process."""
    yield from _pool(1)


@pytest.fixture(scope="session")
def pool2() -> Iterator[WorkerPool]:
    """Two workers."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def pool3() -> Iterator[WorkerPool]:
    """Three workers."""
    yield from _pool(3)


@pytest.fixture(scope="session")
def pool4() -> Iterator[WorkerPool]:
    """Four workers."""
    yield from _pool(4)


@pytest.fixture
def pools(request: pytest.FixtureRequest) -> Callable[[int], WorkerPool]:
    """The pool of a number of workers, for tests whose parameters say how many."""
    return lambda world_size: request.getfixturevalue(f"pool{world_size}")


@pytest.fixture(scope="session")
def stage_inputs(tmp_path_factory: pytest.TempPathFactory) -> StageInputs:
    """Tokenizer, rows and blend for runs of whole stages."""
    return make_stage_inputs(tmp_path_factory.mktemp("stage_inputs"))
