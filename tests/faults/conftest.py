"""Fixtures of the fault harness, and its figures at the end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import cases, checks
from tests.faults.cases import Case, FaultInputs
from tests.faults.checks import Undisturbed
from tests.faults.report import LEDGER, Ledger
from tests.faults.runs import Job, job


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LEDGER.used:
        terminalreporter.section("faults")
        for line in LEDGER.lines():
            terminalreporter.write_line(line)
        LEDGER.write()


@pytest.fixture(scope="session")
def ledger() -> Iterator[Ledger]:
    """The session's figures, which must be those that were asked for: of all tests, or of the ones selected."""
    yield LEDGER
    shortfalls = LEDGER.shortfalls()
    assert not shortfalls, shortfalls


@pytest.fixture(scope="session")
def inputs(stage_inputs, tmp_path_factory) -> FaultInputs:
    return cases.make_inputs(stage_inputs, tmp_path_factory.mktemp("fault_inputs"))


@pytest.fixture(scope="session")
def undisturbed(inputs, tmp_path_factory) -> Callable[[str], Undisturbed]:
    """The undisturbed run of a case, run when first asked for. Later stages begin where earlier ones ended."""
    runs: dict[str, Undisturbed] = {}

    def make(name: str) -> Case:
        if name == "score":
            return cases.score_case(inputs, of("reward").job.run_dir)
        if name == "pipeline":
            return cases.pipeline_case(inputs)
        start = of("sft").job.run_dir if name in ("reward", "preference") else None
        return cases.training_case(inputs, name, start=start)

    def of(name: str) -> Undisturbed:
        if name not in runs:
            case = make(name)
            with job(case.arguments, tmp_path_factory.mktemp(f"undisturbed_{name}")) as opened:
                attempt = opened.start()
                assert attempt.wait_until(lambda one: bool(one.lines())), attempt.said()
                start_up = attempt.seconds
                assert attempt.wait(600) == 0, attempt.said()
                duration = attempt.seconds
                checks.nothing_left(attempt)
                checks.no_temporary_files(opened)
            runs[name] = Undisturbed(case, opened, checks.outcomes(opened.run_dir), start_up, duration)
        return runs[name]

    return of


@pytest.fixture
def disturbed(undisturbed, tmp_path):
    """`disturbed(case)` opens a job that does the same in another folder; its processes are ended with the test."""
    opened = []

    def open_job(name: str, folder: Path | None = None, run_dir: Path | None = None, extra=()) -> Job:
        context = job([*undisturbed(name).case.arguments, *extra], folder or tmp_path / name, run_dir)
        opened.append(context)
        return context.__enter__()

    yield open_job
    for context in opened:
        context.__exit__(None, None, None)
    shutil.rmtree(tmp_path, ignore_errors=True)
