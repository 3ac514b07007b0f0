"""Months of a store's life in minutes: kills, flipped bits, crowds. Not a matter of speed: what must hold, counted.

    python benchmarks/months.py            # 200 kills, 1,000 flips, 8 processes with 1,000 operations each
    python benchmarks/months.py --kills 20 --flips 0 --processes 0

- **kills**: a process that puts, removes, pins, tags and evicts, under a quota and a map that grows, is killed
  (SIGKILL) at a random moment, again and again, in one store. After each, every table must equal those of a store in
  memory that did what was acknowledged, or one operation more; `verify` and the check of all pages must find nothing.
- **flips**: one to eight bits of the data file are flipped, evenly over the kinds of its pages, and a new process opens
  it and reads all that it finds. No tensor may be wrong. A process that crashes counts: LMDB trusts its own pages, and
  `promptdb check` is for files that may be damaged, so it must have seen the damage.
- **crowd**: processes put, look up, remove and fork in one store, each against a plain model of its own prompts.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from common import report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import endurance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--operations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="promptdb-"))
    found: dict[str, object] = {}
    took = {}
    try:
        began = time.perf_counter()
        if options.kills:
            found["kills"] = endurance.kills(directory / "kills", options.kills, options.seed)
            took["kills"] = round(time.perf_counter() - began)
        began = time.perf_counter()
        if options.flips:
            (directory / "flips").mkdir()
            found["flips"] = endurance.flips(directory / "flips", options.flips, options.seed)
            took["flips"] = round(time.perf_counter() - began)
        began = time.perf_counter()
        if options.processes:
            found["crowd"] = endurance.crowds(directory / "crowd", options.processes, options.operations)
            took["crowd"] = round(time.perf_counter() - began)
    finally:
        shutil.rmtree(directory)
    flips = found.get("flips", {})
    rows = [{"pages": kind, **counts} for kind, counts in sorted(flips.items())] if isinstance(flips, dict) else []
    report("months", rows, **{name: value for name, value in found.items() if name != "flips"}, seconds=took)


if __name__ == "__main__":
    main()
