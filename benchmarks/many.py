"""A store of a million small spans: what do opening, a full check, collecting and compacting take, in time and memory?

Each is a process of its own. ``resident_mib`` is its peak of resident memory, and counts pages of the memory map that
were read, as long as nobody else needs the memory; ``anonymous_mib`` is the peak of what it cannot do without.

    python benchmarks/many.py                  # minutes, and 4 GB of disk
    python benchmarks/many.py --nodes 10000
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from common import report
from lookup import ROOT, build

from promptdb.db import PromptDB
from promptdb.pages import check_pages


def anonymous_mib() -> float:
    """Return the memory of this process that no file backs, at this moment."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def peak_mib() -> float:
    """Return the most resident memory that this process had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _watch(seen: list[float], done: threading.Event) -> None:
    while not done.wait(0.05):
        seen.append(anonymous_mib())


def _open(path: Path) -> int:
    with PromptDB(path) as db:
        return len(db.lookup(b"\0\0\0\0", model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).steps)


def _verify(path: Path) -> int:
    with PromptDB(path, readonly=True) as db:
        problems = db.verify()
        assert problems == [], problems[:3]
        return db.stat()["num_nodes"]


def _gc(path: Path) -> int:
    with PromptDB(path) as db:
        return db.gc().num_orphans


def _evict(path: Path) -> int:
    with PromptDB(path) as db:
        before = db.stat()
        report = db.gc(int(before["charged_bytes"] * 0.99))
        assert report.num_evicted > 0
        return report.num_evicted


def _walk(path: Path) -> int:
    with PromptDB(path, readonly=True) as db:
        return sum(1 for _ in db.nodes())


def _pages(path: Path) -> int:
    assert check_pages(path) == []
    return 0


def _compact(path: Path) -> int:
    with PromptDB(path) as db:
        return db.compact().after_bytes


WORK: dict[str, Callable[[Path], int]] = {
    "open, and look up": _open,
    "stat": lambda path: PromptDB(path, readonly=True).stat()["num_nodes"],
    "list all records": _walk,
    "verify": _verify,
    "check the pages": _pages,
    "gc, nothing to collect": _gc,
    "gc, evict one in a hundred bytes": _evict,
    "compact": _compact,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, help="where to make the store; by default the temporary directory")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        seen = [anonymous_mib()]
        done = threading.Event()
        watcher = threading.Thread(target=_watch, args=(seen, done))
        watcher.start()
        began = time.perf_counter()
        result = WORK[arguments.work](arguments.path)
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
        print(json.dumps({"seconds": seconds, "resident": peak_mib(), "anonymous": max(seen), "result": result}))
        return
    directory = Path(tempfile.mkdtemp(dir=arguments.directory))
    rows = []
    try:
        path = directory / "store"
        with PromptDB(path, map_bytes=max(1 << 26, arguments.nodes * 4096)) as db:
            build(db, arguments.nodes)
            stat = db.stat()
            assert stat["num_nodes"] == arguments.nodes
        for name in WORK:
            command = [sys.executable, __file__, "--work", name, "--path", str(path)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout)
            rows.append(
                {
                    "work": name,
                    "seconds": round(found["seconds"], 3),
                    "us_per_node": round(found["seconds"] / arguments.nodes * 1e6, 2),
                    "resident_mib": round(found["resident"]),
                    "anonymous_mib": round(found["anonymous"]),
                }
            )
            print(rows[-1], flush=True)
    finally:
        shutil.rmtree(directory)
    report("many", rows, nodes=arguments.nodes, file_mib=round(stat["file_bytes"] / 2**20))


if __name__ == "__main__":
    main()
