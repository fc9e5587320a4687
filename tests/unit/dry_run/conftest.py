"""One process for all dry runs of this room."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.dry_run.child import Child


@pytest.fixture(scope="session")
def child() -> Iterator[Child]:
    child = Child()
    yield child
    child.close()
