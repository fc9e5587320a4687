"""Commands in one process of their own, which a dry run needs: its default process group is a pretended one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import contextlib, io, json, os, sys
from nemo_align import cli
for line in sys.stdin:
    folder, commands = json.loads(line)
    os.chdir(folder)
    answers = []
    for argv in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(argv)
        answers.append([code, out.getvalue(), err.getvalue()])
    print(json.dumps(answers), flush=True)
"""


@dataclass(frozen=True)
class Answer:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


class Child:
    """A process that runs `nemo-align` commands one after another: torch and Megatron-core are imported once."""

    def __init__(self) -> None:
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
            variables.pop(name, None)
        # Not a pipe: nobody reads it, and it would fill. Closed by `close`.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def run(self, commands: list[list[str]], folder: Path) -> list[Answer]:
        """`nemo-align <argv>` for each, in `folder`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(folder), commands]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._said.seek(0)
            raise AssertionError(f"the process ended: {self._said.read()}")
        return [Answer(*answer) for answer in json.loads(line)]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._said.close()
