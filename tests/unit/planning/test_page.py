"""docs/plan.md shows what the plan says today."""

from __future__ import annotations

from pathlib import Path

import plan_tables
import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "plan.md"


@pytest.mark.parametrize("name", plan_tables.tables())
def test_tables_of_the_page_are_those_of_the_code(name):
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    missing = [line for line in plan_tables.tables()[name] if line not in lines]
    assert not missing, f"python tools/plan_tables.py prints other lines of {name}"
