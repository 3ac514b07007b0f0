"""What every benchmark shares: the machine it ran on, how times are summarised, and where results are kept.

A benchmark is a script: ``python benchmarks/NAME.py``. It asserts that what it timed was correct, prints a table, and
ends with :func:`report`, which writes ``benchmarks/results/NAME.json``.
"""

from __future__ import annotations

import datetime
import gc
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "promptdb", "lmdb", "blake3", "xxhash", "msgpack", "torch", "transformers", "safetensors", "numpy", "zstandard",
    "cryptography",
)  # fmt: skip

Row = Mapping[str, Any]
_ROWS = 16  # of logits: they stay in the cache of the CPU


def environment(*, device: str = "") -> dict[str, Any]:
    """Return what a reader must know of the machine to compare figures: no names, no paths."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if "promptdb" not in versions:  # run from a checkout
        from promptdb.version import __version__

        versions["promptdb"] = __version__
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": device or "cpu",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": versions,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def median(samples: Iterable[float]) -> float:
    """Return the middle sample (of an even number, the mean of the two in the middle)."""
    ordered = sorted(samples)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def percentile(samples: Iterable[float], percent: float) -> float:
    """Return the smallest sample that at least ``percent`` of all do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def timed(work: Callable[[], Any], *, repeat: int = 5, warmup: int = 1) -> list[float]:
    """Run ``work`` ``warmup + repeat`` times without garbage collection; return the seconds of the last ``repeat``."""
    for _ in range(warmup):
        work()
    samples = []
    was_on = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeat):
            begin = time.perf_counter()
            work()
            samples.append(time.perf_counter() - begin)
    finally:
        if was_on:
            gc.enable()
    return samples


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of m tokens, ``[m]``, from ``[m, vocabulary]``: as a careful user computes them.

    A few rows at a time: a whole ``log_softmax`` would write as much memory again as the logits take, all of it fresh.
    """
    import torch

    pairs = zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    return torch.cat([rows.gather(1, these[:, None])[:, 0] - rows.logsumexp(1) for rows, these in pairs])


def table(rows: Sequence[Row]) -> str:
    """Return rows as aligned text; columns are those of the first row."""
    columns = list(rows[0]) if rows else []
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(columns)]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if type(value) is int else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def report(name: str, rows: Sequence[Row], *, device: str = "", **notes: Any) -> Path:
    """Print ``rows``, and write them with the environment and ``notes`` to ``benchmarks/results/<name>.json``."""
    print(table(rows))
    for key, value in notes.items():
        print(f"{key}: {value}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    machine = environment(device=device)
    content = {"benchmark": name, "environment": machine, **notes, "rows": [dict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
