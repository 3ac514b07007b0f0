"""A store that is full for a long time: how large is its file, how fast does it write, do its readers wait?

Prompts of one to four spans are put whose blobs have 16 KiB to 8 MiB, all sizes (by their logarithm) equally often,
until ten times the quota was written; a third of them stand on one of 16 shared spans. Then, with the store full and a
writer busy, another process looks prompts up and reads their blobs.

A round is one quota of bytes. The first one fills the store; the second is the first that evicts.

    python benchmarks/quota.py                       # 256 MB; minutes and about 0.4 GB of disk
    python benchmarks/quota.py --quota-mb 4000
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
from pathlib import Path

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


def reader_times(path: Path, seconds: float) -> tuple[subprocess.Popen[str], Path]:
    """Start a process that reads for a time."""
    command = [sys.executable, __file__, "--read", str(path), "--seconds", str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process, path


def summary(process: subprocess.Popen[str]) -> dict[str, float]:
    """Return what the readers' lines say, in microseconds and MB/s."""
    lines = [[float(word) for word in line.split()] for line in process.communicate()[0].splitlines()]
    assert process.returncode == 0
    lookups, reads, sizes = zip(*lines, strict=True)
    return {
        "reads": len(lines),
        "lookup_median_us": round(median(lookups) * 1e6, 1),
        "lookup_p99_us": round(percentile(lookups, 99) * 1e6, 1),
        "read_median_ms": round(median(reads) * 1e3, 2),
        "read_p99_ms": round(percentile(reads, 99) * 1e3, 2),
        "read_mb_s": round(sum(sizes) / sum(reads) / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quota-mb", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--policy", default="cost")
    parser.add_argument("--directory", type=Path, help="where to make the store; by default the temporary directory")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to read")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read_for(arguments.read, arguments.seconds)
        return
    quota = arguments.quota_mb * 10**6
    source = random.Random(7)
    directory = Path(tempfile.mkdtemp(dir=arguments.directory))
    path = directory / "store"
    rows = []
    try:
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
                process, _ = reader_times(path, arguments.seconds)
                while process.poll() is None:
                    if name == "busy":
                        put(db, next(stream), source)
                    else:
                        time.sleep(0.05)
                    if process.stdout is not None and process.poll() is None and name == "idle":
                        break
                readers[name] = summary(process)
            final = db.stat()["file_bytes"] / quota
            assert db.verify() == []
    finally:
        shutil.rmtree(directory)
    speed = rows[-1]["mb_s"] / rows[1]["mb_s"]
    report(
        "quota",
        rows,
        quota_mb=arguments.quota_mb,
        policy=arguments.policy,
        blob_bytes=[SMALLEST, LARGEST],
        readers=readers,
        file_of_quota=round(final, 3),
        last_round_of_second=round(speed, 2),
        target=f"file <= {TARGET_FILE}x the quota, last round >= {TARGET_SPEED}x the first full one",
        met=bool(final <= TARGET_FILE and speed >= TARGET_SPEED),
    )


if __name__ == "__main__":
    main()
