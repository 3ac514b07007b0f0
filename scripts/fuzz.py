"""Coverage-guided fuzzing of all that reads bytes of others: blobs, records, archives. Needs atheris (Linux).

    python scripts/fuzz.py all --seconds 60      # each target in a process of its own; results in benchmarks/results
    python scripts/fuzz.py blob -max_total_time=60 [options of libFuzzer]

Checksums are made to hold, or the fuzzer would never get past them. Whatever comes in, only an error of promptdb's own
may come out, within 2 GiB of memory and 10 seconds.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["promptdb", "msgpack"]):
    from promptdb import PromptDB
    from promptdb.archive import ImportOptions, Selection, export_nodes, import_archive
    from promptdb.blobs import TensorSpec, build_blob, parse_blob
    from promptdb.commits import SpanPayload
    from promptdb.errors import PromptDBError
    from promptdb.format import Group, NodeRecord, checksum, unpack_record, unpack_root
    from promptdb.frames import (
        BLOB,
        DONE,
        LOGITS_AFTER,
        MANIFEST,
        MODEL,
        NODE,
        PATH,
        ROOT,
        TOKENIZER,
        FrameReader,
        FrameWriter,
    )
    from promptdb.keys import Root, pack_tokens
    from promptdb.labels import label_key, unpack_label
    from promptdb.life import Life
    from promptdb.served import unpack_served
    from promptdb.snapshot import logits_owner

KEY = bytes(range(32))
KINDS = (MANIFEST, MODEL, TOKENIZER, ROOT, PATH, NODE, BLOB, LOGITS_AFTER, DONE)
LIMITS = dict.fromkeys(KINDS, 1 << 30)
PROMPT = pack_tokens(range(20))


def blob(data: bytes) -> None:
    """Read a safetensors header, and every tensor that it names."""
    for view in parse_blob(data).values():
        bytes(view.data)


def record(data: bytes) -> None:
    """Read a record of every kind."""
    sealed = checksum(KEY, data) + data
    label = label_key("pin", KEY, "name")
    for read in (
        lambda: unpack_record(KEY, sealed),
        lambda: NodeRecord.unpack(KEY, sealed),
        lambda: unpack_root(KEY, sealed),
        lambda: Life.unpack(KEY, sealed),
        lambda: unpack_served(KEY, sealed),
        lambda: unpack_label(label, memoryview(checksum(label, data) + data)),
        lambda: logits_owner(sealed),
    ):
        with suppress(PromptDBError):
            read()


def archive(data: bytes) -> None:
    """Import an archive of which some frames were replaced, moved or left out."""
    source = atheris.FuzzedDataProvider(data)
    frames = list(FRAMES)
    for _ in range(source.ConsumeIntInRange(1, 4)):
        at = source.ConsumeIntInRange(0, len(frames) - 1)
        what = source.ConsumeIntInRange(0, 4)
        if what == 0:
            frames[at] = (frames[at][0], source.ConsumeBytes(source.ConsumeIntInRange(0, 300)))
        elif what == 1:
            body = bytearray(frames[at][1])
            if body:
                place = source.ConsumeIntInRange(0, len(body) - 1)
                part = source.ConsumeBytes(source.ConsumeIntInRange(1, 12))
                body[place : place + len(part)] = part
            frames[at] = (frames[at][0], bytes(body))
        elif what == 2:
            del frames[at]
        elif what == 3:
            frames.insert(
                at, (source.PickValueInList(list(KINDS)), source.ConsumeBytes(source.ConsumeIntInRange(0, 300)))
            )
        else:
            frames.insert(source.ConsumeIntInRange(0, len(frames) - 1), frames[at])
        if not frames:
            return
    stream = io.BytesIO()
    writer = FrameWriter(stream)
    for kind, body in frames:
        writer.write(kind, body)
    with PromptDB.in_memory() as db:
        try:
            with suppress(PromptDBError):
                import_archive(db, io.BytesIO(stream.getvalue()), ImportOptions())
        finally:
            assert db.verify() == []
    with suppress(PromptDBError), PromptDB.in_memory() as db:
        import_archive(db, io.BytesIO(data))


def sound_archive() -> list[tuple[bytes, bytes]]:
    """Return the frames of an archive with everything in it."""
    root, layout = Root("aa" * 32, "bb" * 32), (Group((0,), 1, 2, "F32"),)

    def encode(position: int) -> list[SpanPayload]:
        spans = []
        for start in range(position, 20, 10):
            kv = build_blob([(TensorSpec("kv.0", "F32", (2, 1, 10, 2)), bytes(160))])
            scores = [(TensorSpec("token_logprobs", "F32", (10,)), bytes(40))]
            blobs = {"kv": kv, "lp": build_blob([*scores, (TensorSpec("greedy_ids", "I32", (10,)), bytes(40))])}
            spans.append(SpanPayload(start, start + 10, layout, blobs, 0.1, {}))
        return spans

    stream = io.BytesIO()
    with PromptDB.in_memory(chunk_tokens=10) as db:
        after = {20: build_blob([(TensorSpec("logits", "F32", (6,)), bytes(24))])}
        db.put(root, PROMPT, 0, encode, after)
        export_nodes(db, Selection(), stream)
    stream.seek(0)
    reader, frames = FrameReader(stream), []
    while True:
        kind, body, _ = reader.read(LIMITS)
        frames.append((kind, bytes(body)))
        if kind == DONE:
            return frames


TARGETS: dict[str, Callable[[bytes], None]] = {"blob": blob, "record": record, "archive": archive}


def run_all(seconds: int) -> None:
    """Run every target for some seconds; report how many inputs it had, and whether all went well."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
    from common import report

    rows = []
    for name in TARGETS:
        options = [f"-max_total_time={seconds}", "-rss_limit_mb=2048", "-timeout=10", "-print_final_stats=1"]
        done = subprocess.run([sys.executable, __file__, name, *options], capture_output=True, text=True, check=False)
        inputs = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
        covered = re.findall(r"cov: (\d+)", done.stderr)
        rows.append(
            {
                "target": name,
                "inputs": int(inputs[1]) if inputs else 0,
                "edges_covered": int(covered[-1]) if covered else 0,
                "failed": done.returncode != 0,
            }
        )
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
    report("fuzz", rows, seconds_each=seconds)
    sys.exit(any(row["failed"] for row in rows))


def main() -> None:
    """Fuzz one target, or all."""
    if sys.argv[1:2] == ["all"]:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("target")
        parser.add_argument("--seconds", type=int, default=60)
        run_all(parser.parse_args().seconds)
        return
    work = TARGETS[sys.argv[1]]

    def one(data: bytes) -> None:
        with suppress(PromptDBError):
            work(data)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], one)
    atheris.Fuzz()


FRAMES = sound_archive()

if __name__ == "__main__":
    main()
