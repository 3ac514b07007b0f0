"""A store that is full for a long time: how large is its file, how fast does it write, do its readers wait?

Prompts of one to four spans are put whose blobs have 16 KiB to 8 MiB, all sizes (by their logarithm) equally often,
until ten times the quota was written; a third of them stand on one of 16 shared spans. Then, with the store full and a
writer busy, another process looks prompts up and reads their blobs.

A round is one quota of bytes. The first one fills the store; the second is the first that evicts. A bare LMDB that
takes values of such sizes, and forgets one at random when it is full, is measured beside it.

    python benchmarks/quota.py                       # minutes, and 5 GB of disk
    python benchmarks/quota.py --quota-mb 256
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
from common import median, percentile, report

from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import PutReport, SpanPayload
from promptdb.db import PromptDB
from promptdb.keys import Root, pack_tokens

ROOT = Root("aa" * 32, "bb" * 32)
SMALLEST, LARGEST = 16 << 10, 8 << 20
SPAN_TOKENS = 16
TARGET_FILE, TARGET_SPEED = 1.35, 0.8
NOISE = random.Random(0).randbytes(LARGEST)


def blob_of(size: int, seed: int) -> bytearray:
    """Return a blob of about ``size`` bytes that others do not equal."""
    at = seed * 4099 % (LARGEST - size + 1)
    return build_blob([(TensorSpec("x", "U8", (size,)), memoryview(NOISE)[at : at + size])])


def prompts(source: random.Random) -> Iterator[list[int]]:
    """Yield prompts, some of which share their first span."""
    number = 0
    while True:
        number += 1
        length = SPAN_TOKENS * source.randint(1, 4)
        first = source.randrange(16) if source.random() < 1 / 3 else 1000 + number
        yield [*([first] * SPAN_TOKENS), *(1000 + number + at for at in range(length - SPAN_TOKENS))]


def put(db: PromptDB, tokens: list[int], source: random.Random) -> PutReport:
    """Store a prompt; every new span gets a blob of a size of its own."""

    def encode(start: int) -> list[SpanPayload]:
        spans = []
        for at in range(start, len(tokens), SPAN_TOKENS):
            size = int(math.exp(source.uniform(math.log(SMALLEST), math.log(LARGEST))))
            spans.append(SpanPayload(at, at + SPAN_TOKENS, (), {"x": blob_of(size, tokens[at])}, size / 1e7, {}))
        return spans

    packed = pack_tokens(tokens)
    start = db.lookup(packed, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).num_tokens
    return db.put(ROOT, packed, start, encode)


def stored_prompts(db: PromptDB) -> list[bytes]:
    """Return the packed tokens to the end of every span."""
    records = [record for _, record in db.nodes()]
    with db.read() as snapshot:
        found = [db.prefix(snapshot, record) for record in records]
    return [packed for packed in found if packed]


def read_for(path: Path, seconds: float) -> None:
    """Look up and read for a time, and print a line for each: seconds of the lookup, of the read, and its bytes."""
    source = random.Random(1)
    with PromptDB(path, readonly=True, verify_reads="never") as db:
        asked = stored_prompts(db)
        print("ready", flush=True)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            packed = source.choice(asked)
            begin = time.perf_counter()
            match = db.lookup(packed, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id)
            looked_up = time.perf_counter()
            size = 0
            with db.read() as snapshot:
                for step in match.steps:
                    record = snapshot.record(step.node)
                    if record is not None:  # it may have been evicted just now
                        size += sum(
                            len(bytes(view.data)) for view in (snapshot.blob(step.node, record, "x") or {}).values()
                        )
            print(looked_up - begin, time.perf_counter() - looked_up, size)


def reader(path: Path, seconds: float) -> subprocess.Popen[str]:
    """Start a process that reads for a time, and return when it begins to."""
    command = [sys.executable, __file__, "--read", str(path), "--seconds", str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def summary(output: str) -> dict[str, float]:
    """Return what a reader's lines say, in microseconds and MB/s."""
    lines = [[float(word) for word in line.split()] for line in output.splitlines()]
    lookups, reads, sizes = zip(*lines, strict=True)
    return {
        "reads": len(lines),
        "lookup_median_us": round(median(lookups) * 1e6, 1),
        "lookup_p99_us": round(percentile(lookups, 99) * 1e6, 1),
        "read_median_ms": round(median(reads) * 1e3, 2),
        "read_p99_ms": round(percentile(reads, 99) * 1e3, 2),
        "read_mb_s": round(sum(sizes) / sum(reads) / 1e6),
    }


def plain_loop(directory: Path, quota: int, rounds: int, source: random.Random) -> dict[str, float]:
    """Return how a bare LMDB does: values of the same sizes, one a transaction, a random one out when it is full."""
    env = lmdb.open(str(directory / "plain"), map_size=quota * 4)
    sizes: dict[bytes, int] = {}
    total = number = 0
    speeds = []
    for _ in range(rounds):
        begin, written = time.perf_counter(), 0
        while written < quota:
            size = int(math.exp(source.uniform(math.log(SMALLEST), math.log(LARGEST))))
            key, number = number.to_bytes(8, "big"), number + 1
            with env.begin(write=True) as txn:
                while total + size > quota:
                    victim = source.choice(list(sizes))
                    txn.delete(victim)
                    total -= sizes.pop(victim)
                txn.put(key, memoryview(NOISE)[:size])
            sizes[key] = size
            total += size
            written += size
        speeds.append(written / (time.perf_counter() - begin) / 1e6)
    env.close()
    return {
        "file": round((directory / "plain" / "data.mdb").stat().st_size / quota, 3),
        "mb_s": round(median(speeds[1:]), 1),
    }


def measure(path: Path, quota: int, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what each round was like, and what holds at the end."""
    source = random.Random(7)
    rows = []
    with PromptDB(path, quota_bytes=quota, policy=arguments.policy, chunk_tokens=SPAN_TOKENS) as db:
        stream = prompts(source)
        for number in range(arguments.rounds):
            begin, written, puts, slowest = time.perf_counter(), 0, 0, 0.0
            while written < quota:
                began = time.perf_counter()
                written += put(db, next(stream), source).num_bytes
                slowest = max(slowest, time.perf_counter() - began)
                puts += 1
            seconds = time.perf_counter() - begin
            stat = db.stat()
            assert stat["charged_bytes"] <= quota
            rows.append(
                {
                    "quota_mb": quota // 10**6,
                    "round": number + 1,
                    "mb_s": round(written / seconds / 1e6, 1),
                    "puts": puts,
                    "slowest_put_ms": round(slowest * 1e3),
                    "charged": round(stat["charged_bytes"] / quota, 3),
                    "file": round(stat["file_bytes"] / quota, 3),
                    "spans": stat["num_nodes"],
                    "evicted": stat["num_evicted"],
                }
            )
        readers = {}
        for name in ("idle", "busy"):
            process = reader(path, arguments.seconds)
            with ThreadPoolExecutor(1) as pool:  # what takes the lines while the writer writes
                output = pool.submit(process.communicate)
                while name == "busy" and not output.done():
                    put(db, next(stream), source)
                lines = output.result()[0]
            assert process.returncode == 0
            readers[name] = summary(lines)
        final = round(db.stat()["file_bytes"] / quota, 3)
        assert db.verify() == []
    return rows, {
        "file_of_quota": final,
        "last_round_of_second": round(rows[-1]["mb_s"] / rows[1]["mb_s"], 2),
        "readers": readers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quota-mb", type=int, nargs="+", default=[256, 1000, 4000])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--directory", type=Path, help="where to make the store; by default the temporary directory")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to read")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read_for(arguments.read, arguments.seconds)
        return
    rows: list[dict[str, Any]] = []
    found = {}
    for quota_mb in arguments.quota_mb:
        directory = Path(tempfile.mkdtemp(dir=arguments.directory))
        try:
            rounds, end = measure(directory / "store", quota_mb * 10**6, arguments)
            end["plain_lmdb"] = plain_loop(directory, quota_mb * 10**6, arguments.rounds, random.Random(7))
        finally:
            shutil.rmtree(directory)
        end["met"] = end["file_of_quota"] <= TARGET_FILE and end["last_round_of_second"] >= TARGET_SPEED
        rows += rounds
        found[quota_mb] = end
        print(quota_mb, end, flush=True)
    report(
        "quota",
        rows,
        policy=arguments.policy,
        blob_bytes=[SMALLEST, LARGEST],
        target=f"file <= {TARGET_FILE}x the quota, last round >= {TARGET_SPEED}x the first full one",
        by_quota_mb=found,
    )


if __name__ == "__main__":
    main()
