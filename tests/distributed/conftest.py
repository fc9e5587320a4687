"""Fixtures of the tests that run whole stages on several processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import invariance_report
from tests.distributed.stage_runs import run_stage
from tests.stage_inputs import StageInputs, stage_overrides


@pytest.fixture(scope="session")
def policy(pool1, stage_inputs: StageInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of a pretrained model that runs start from."""
    run_dir = tmp_path_factory.mktemp("policy")
    run_stage(pool1, "pretrain", run_dir, stage_overrides(stage_inputs, "pretrain"))
    return run_dir


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How far the invariance tests of this session were from the oracle."""
    if lines := invariance_report.lines():
        from tests.distributed.invariance_design import SUMMARY

        terminalreporter.section("invariance")
        for line in (SUMMARY, *lines):
            terminalreporter.write_line(line)
