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


@pytest.mark.parametrize(("model", "what"), plan_tables.MEASURED)
def test_one_h100_did_what_the_plan_says(model, what):
    """GiB that tensors held at most, and seconds of a step, on a real H100."""
    seconds, gib = plan_tables.MEASURED[model, what]
    memory, planned_seconds = plan_tables.one_gpu(model, what)
    assert memory.tensors / 2**30 == pytest.approx(gib, rel=0.025)
    if "unfused" not in what:  # the time of such attention is not modelled
        assert planned_seconds == pytest.approx(seconds, rel=0.10 if "FP8" in what else 0.03)
