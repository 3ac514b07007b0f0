"""What the tests of archives share: prompts whose every stored number can be checked, and archives made by hand."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import struct
from array import array
from pathlib import Path

import msgpack
from blake3 import blake3

from promptdb import PromptDB
from promptdb.archive import ImportOptions, Selection, export_nodes, import_archive
from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import SpanPayload
from promptdb.errors import CorruptDataError, StoreError
from promptdb.format import Group, NodeRecord, pack_record
from promptdb.frames import FrameReader, FrameWriter
from promptdb.keys import PrefixHasher, Root, pack_tokens
from promptdb.trie import cut

MODEL, OTHER_MODEL, TOKENIZER = "aa" * 32, "cc" * 32, "bb" * 32
ROOT = Root(MODEL, TOKENIZER)
ROOTS = [ROOT, Root(MODEL, TOKENIZER, "tenant"), Root(OTHER_MODEL, TOKENIZER)]
LAYOUT = (Group((0, 1, 4), 2, 3, "F32"), Group((2, 3), 1, 2, "BF16"))
VOCABULARY = 5
TIMEOUT_S = 120

# What is stored for a token depends on all tokens before it, and nothing else: so it can be checked whatever the cuts.


def numbers(root, packed, count):
    """Return ``count`` numbers that belong to the last token of a prompt."""
    raw = blake3(packed, key=root.digest).digest(length=4 * count)
    return [(number % 4001 - 2000) / 1000 for number in struct.unpack(f"<{count}I", raw)]


def encoded(dtype, values):
    raw = struct.pack(f"<{len(values)}f", *values)
    return raw if dtype == "F32" else b"".join(raw[at + 2 : at + 4] for at in range(0, len(raw), 4))


def rows_of(root, packed, position):
    """Return, by group, the keys and values ``[slots * heads]`` of the token at a position, as bytes."""
    found, values = [], iter(numbers(root, packed[: 4 * position + 4], 32))
    for group in LAYOUT:
        rows = range(len(group.slots) * group.kv_heads)
        found.append([encoded(group.dtype, list(itertools.islice(values, group.head_dim))) for _ in rows])
    return found


def score_of(root, packed, position):
    first, second = numbers(root, packed[: 4 * position + 4], 2)
    return (-abs(first) if position else math.nan), (int(1000 + 100 * second) if position else -1)


def logits_of(root, packed):
    data = struct.pack(f"<{VOCABULARY}f", *numbers(root, packed + b"logi", VOCABULARY))
    return build_blob([(TensorSpec("logits", "F32", (VOCABULARY,)), data)])


def payload(root, packed, start, end):
    tokens = range(start, end)
    rows = [rows_of(root, packed, position) for position in tokens]
    tensors = []
    for number, group in enumerate(LAYOUT):
        count = len(group.slots) * group.kv_heads
        data = b"".join(rows[at][number][row] for row in range(count) for at in range(len(tokens)))
        tensors.append((TensorSpec(f"kv.{number}", group.dtype, group.span_shape(len(tokens))), data))
    scores = [score_of(root, packed, position) for position in tokens]
    logprobs, greedy = array("f", [one for one, _ in scores]), array("i", [two for _, two in scores])
    shape = (len(tokens),)
    lp = [
        (TensorSpec("token_logprobs", "F32", shape), logprobs.tobytes()),
        (TensorSpec("greedy_ids", "I32", shape), greedy.tobytes()),
    ]
    blobs = {"kv": build_blob(tensors), "lp": build_blob(lp)}
    return SpanPayload(start, end, LAYOUT, blobs, 0.25, {"torch": "2", "past_tokens": start})


def put(db, tokens, *, root=ROOT, boundaries=(), logits=(), chunk_tokens=None):
    packed = pack_tokens(tokens)

    def encode(position):
        spans = cut(position, len(tokens), boundaries, chunk_tokens or db.chunk_tokens)
        return [payload(root, packed, start, end) for start, end in spans]

    return db.put(root, packed, 0, encode, {at: logits_of(root, packed[: 4 * at]) for at in logits})


def lookup(db, tokens, root=ROOT):
    return db.lookup(tokens, model=root.weights_id, tokenizer=root.tokenizer_id, namespace=root.namespace)


def check_content(db, tokens, root=ROOT, content_root=None):
    """Assert that everything stored along a prompt is what belongs to it; return how many tokens are stored."""
    content_root = content_root or root
    packed = pack_tokens(tokens)
    with db.read() as snapshot:
        match = snapshot.match(root, packed)
        for step in match.steps:
            record = snapshot.record(step.node)
            tensors = snapshot.blob(step.node, record, "kv")
            scores = snapshot.blob(step.node, record, "lp")
            assert record.layout == LAYOUT
            for at in range(step.num_tokens):
                expected = rows_of(content_root, packed, step.start + at)
                for number, group in enumerate(LAYOUT):
                    width = len(expected[number][0])
                    data = bytes(tensors[f"kv.{number}"].data)
                    starts = range(at * width, len(data), record.num_tokens * width)
                    assert [data[start : start + width] for start in starts] == expected[number], group
                logprob, greedy = score_of(content_root, packed, step.start + at)
                assert struct.pack("<f", scores["token_logprobs"].floats()[at]) == struct.pack("<f", logprob)
                assert bytes(scores["greedy_ids"].data)[4 * at : 4 * at + 4] == struct.pack("<i", greedy)
        hasher = PrefixHasher(root.digest, packed)
        for position in range(1, match.num_tokens + 1):
            view = snapshot.logits(hasher.at(position))
            if view is not None:
                blob = logits_of(content_root, packed[: 4 * position])
                assert bytes(view.data) == bytes(blob[-4 * VOCABULARY :])
    return match.num_tokens


def exported(db, selection=None):
    stream = io.BytesIO()
    report = export_nodes(db, selection or Selection(), stream)
    assert report.num_bytes == len(stream.getvalue())
    return stream.getvalue()


def imported(db, data, **options):
    return import_archive(db, io.BytesIO(data), ImportOptions(**options))


def num_logits(db):
    return db.stat()["num_logits"]


def frames_of(data):
    """Return the frames of an archive: (kind, body)."""
    reader = FrameReader(io.BytesIO(data))
    limits = dict.fromkeys((b"MANI", b"MODL", b"TOKN", b"ROOT", b"PATH", b"NODE", b"BLOB", b"LOGI", b"DONE"), 1 << 40)
    found = []
    while not found or found[-1][0] != b"DONE":
        found.append(reader.read(limits)[:2])
    return found


def archive_of(frames, **done):
    """Return an archive of frames, with totals and a digest at its end that hold unless ``done`` says otherwise."""
    stream = io.BytesIO()
    writer = FrameWriter(stream)
    counts = dict.fromkeys(("num_roots", "num_spans", "num_tokens", "num_logits", "blob_bytes"), 0)
    for kind, body in frames:
        if kind == b"DONE":
            continue
        writer.write(kind, body)
        if kind == b"ROOT":
            counts["num_roots"] += 1
        elif kind == b"NODE":
            counts["num_spans"] += 1
            with contextlib.suppress(CorruptDataError):  # some are forged badly
                counts["num_tokens"] += NodeRecord.unpack(bytes(body[:32]), bytes(body[32:])).num_tokens
        elif kind == b"BLOB":
            counts["blob_bytes"] += len(body)
        elif kind == b"LOGI":
            counts["num_logits"] += 1
            counts["blob_bytes"] += len(body) - 8 + 48
    fields = {**counts, "digest": writer.digest(), **done}
    writer.write(b"DONE", pack_record(b"done", fields))
    return stream.getvalue()


def rewritten(data, manifest):
    frames = frames_of(data)
    fields = msgpack.unpackb(bytes(frames[0][1][16:])) | manifest
    return archive_of([(b"MANI", pack_record(b"manifest", fields)), *frames[1:]])


def check_same(db, prompts):
    assert [check_content(db, tokens) for tokens in prompts] == [len(tokens) for tokens in prompts]
    assert all(lookup(db, tokens).has_logits for tokens in prompts)
    assert db.verify() == []


def environment():
    """Return the environment of a child that imports what the tests share."""
    here = Path(__file__).parent
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(here), str(here.parent)))}


def tamper(db, table, change, number=0):
    """Change an item of a table behind the store's back."""

    def work(writer):
        key, value = list(writer.scan(table))[number]
        change(writer, key, bytes(value))

    db._index.transact(work)


def flip_last(table):
    return lambda writer, key, value: writer.put(table, key, value[:-1] + bytes([value[-1] ^ 1]))


def num_spans(path):
    try:
        with PromptDB(path, readonly=True) as db:
            return db.stat()["num_nodes"]
    except StoreError:  # not there yet
        return 0
