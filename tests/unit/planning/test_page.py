"""docs/plan.md shows what the plan says today."""

from __future__ import annotations

from pathlib import Path

import plan_tables
import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "plan.md"


TABLES = plan_tables.tables()


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_the_page_are_those_of_the_code(name):
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    missing = [line for line in TABLES[name] if line not in lines]
    assert not missing, f"python tools/plan_tables.py prints other lines of {name}"


def test_figures_in_the_sentences_are_those_of_the_code():
    text = " ".join(PAGE.read_text(encoding="utf-8").replace("**", "").split())
    assert [said for said in plan_tables.statements() if said not in text] == []


def test_the_papers_figures_are_near():
    """Bubbles within two points, activations of interleaving to a hundredth."""
    for row in list(plan_tables.papers())[2:]:
        what, _, paper, plan = (cell.strip() for cell in row.split("|")[1:-1])
        if "=" in paper:
            expected, found = (float(text.rpartition("=")[2].strip().removesuffix(" %")) for text in (paper, plan))
            assert found == pytest.approx(expected, abs=2.0 if "bubble" in what else 0.1), what


def test_memory_of_one_gpu_was_the_plans():
    """GiB that tensors held at most on a real GPU: the plan's, and the probabilities that its attention kept."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in list(plan_tables.measured())[2:]]
    found = {(row[0], row[1]): [float(cell) for cell in row[2:5]] for row in rows}
    for (model, precision), (measured, planned, scores) in found.items():
        if model == "340b_rank":  # of the 15B further matrices of that size live for a moment
            assert planned + scores == pytest.approx(measured, rel=0.015), precision
