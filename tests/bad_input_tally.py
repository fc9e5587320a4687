"""How many bad inputs the tests of this session have tried; tests/conftest.py prints it at the end."""

from __future__ import annotations

from collections import Counter

tried: Counter[str] = Counter()
