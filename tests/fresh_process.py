"""A fresh Python process for what must not happen in the tests' own: fake process groups, memory peaks, pretences."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def answer(expression: str, imports: str, *, seconds: float = 240) -> Any:
    """The value of `expression` after `imports`, computed in a process of its own and brought here as JSON."""
    code = f"import json\n{imports}\nprint(json.dumps({expression}))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])
