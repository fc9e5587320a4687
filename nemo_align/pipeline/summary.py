"""The end of a pipeline: manifest brought up to date, table, report."""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_align.pipeline.manifest import Manifest, read_manifest
from nemo_align.pipeline.report import write_report
from nemo_align.pipeline.stage_ends import refresh_records
from nemo_align.pipeline.table import print_table


def summarize(run_dir: Path, manifest: Manifest) -> None:
    """Print the table and write report.html."""
    print_table(manifest)
    try:
        print(f"report: {write_report(run_dir, manifest)}")
    except ImportError as error:  # an extra: the training was the point, and it is done
        print(f"no report.html: {error.name} is not installed; pip install 'nemo_align[report]'", file=sys.stderr)


def refresh(run_dir: Path) -> Manifest:
    """The manifest with what became of stages while no pipeline process watched (jobs of SLURM); rewritten.

    Raises ValueError if `run_dir` holds none.
    """
    manifest = read_manifest(run_dir)
    if manifest is None:
        raise ValueError(f"{run_dir} holds no manifest.json of a pipeline")
    refresh_records(manifest, [record.name for record in manifest.stages])
    manifest.write(run_dir)
    return manifest
