#!/usr/bin/env python3
"""Check what the quickstart promises: every stage complete, and better on its held-out rows than when it began.

python tools/check_quickstart.py runs/quickstart/recipe

Exit code 1 names what did not hold. Reads manifest.json only.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import mean


def means(metrics: dict[str, float]) -> dict[str, float]:
    """validation/<set>/<name> -> mean over the sets of each <name>."""
    values: dict[str, list[float]] = {}
    for key, value in metrics.items():
        _, _, name = key.split("/", 2)
        values.setdefault(name, []).append(value)
    return {name: mean(found) for name, found in values.items()}


def failures(stage: dict) -> list[str]:
    """What a stage does not fulfil."""
    if stage["status"] != "complete":
        return [f"status is {stage['status']}"]
    if stage["verb"] == "score":
        return []
    first, last = means(stage["metrics"]["first"]), means(stage["metrics"]["last"])
    checks = {"loss went down": last["loss"] < first["loss"]}
    if stage["verb"] == "reward":
        checks = {
            "mean Pearson above 0.1": last["pearson"] > 0.1,
            "mean absolute error below that of predicting the mean": last["mae"] < last["mae_of_mean"],
        }
    elif stage["name"] == "dpo":
        checks |= {
            "first preference loss is ln 2": abs(first["preference_loss"] - math.log(2)) < 1e-5,
            "accuracy above 0.5": last["rewards/accuracies"] > 0.5,
            "margin above 0": last["rewards/margins"] > 0,
        }
    return [f"not so: {name}" for name, holds in checks.items() if not holds]


def main() -> int:
    manifest = json.loads((Path(sys.argv[1]) / "manifest.json").read_text())
    wrong = [f"{stage['name']}: {text}" for stage in manifest["stages"] for text in failures(stage)]
    for line in wrong:
        print(line, file=sys.stderr)
    if not wrong:
        print(f"all {len(manifest['stages'])} stages are complete and better on held-out rows than at their start")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
