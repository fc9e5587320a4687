"""Dry runs of the stages of a pipeline in one process.

    python -m nemo_align.dry_run <run_dir> <verb> <config.yaml> <lead> [<verb> <config.yaml> <lead> ...]

The configurations are resolved; what a stage reads below `run_dir`, the pipeline's, an earlier one will have written.
Its job is told to stop `lead` seconds before the time limit.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nemo_align.config.compose import load_resolved
from nemo_align.config.errors import raised_by_this_package
from nemo_align.dry_run import without_gpu
from nemo_align.runtime import exit_codes, logs


def main(run_dir: str, stages: list[str]) -> int:
    """Dry-run every stage, also after one that is refused; USER_ERROR if any was."""
    without_gpu()
    logs.quiet_libraries()
    from nemo_align.dry_run.run import dry_run  # imports torch

    code = exit_codes.SUCCESS
    for verb, path, lead in zip(stages[::3], stages[1::3], stages[2::3], strict=True):
        try:
            config = load_resolved(verb, path)
            print(dry_run(verb, config, written_before=Path(run_dir), lead=int(lead)), flush=True)
        except ValueError as error:
            if not raised_by_this_package(error):
                raise
            code = exit_codes.USER_ERROR
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    if len(sys.argv) < 5 or len(sys.argv) % 3 != 2:
        sys.exit("usage: python -m nemo_align.dry_run <run_dir> <verb> <config.yaml> <lead> [...]")
    try:
        sys.exit(main(sys.argv[1], sys.argv[2:]))
    except BrokenPipeError:  # `... dry_run=true | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(exit_codes.SUCCESS)
