"""What the tests of quotas, times to live and pins share: a store whose clock stands still."""

import pytest

from promptdb import PromptDB
from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import SpanPayload
from promptdb.format import LIFE
from promptdb.keys import Root, pack_tokens
from promptdb.life import Life

ROOT = Root("aa" * 32, "bb" * 32)


class Clock:
    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture(name="clock")
def a_clock():
    return Clock()


@pytest.fixture(name="db", params=["on disk", "in memory"])
def dated_db(request, tmp_path, clock):
    """A store whose every byte and count must hold when the test ends."""
    if request.param == "on disk":
        opened = PromptDB(tmp_path / "store", chunk_tokens=16, clock=clock, map_bytes=1)
    else:
        opened = PromptDB.in_memory(chunk_tokens=16, clock=clock)
    with opened as db:
        yield db
        assert db.verify() == []


def put(db, tokens, *, size=1000, root=ROOT, compute_s=1.0, **options):
    """Store a prompt in spans of 16 tokens, each with a blob of ``size`` zeros."""
    tokens = list(tokens)
    blob = bytes(build_blob([(TensorSpec("x", "U8", (size,)), bytes(size))]))

    def encode(position):
        ends = [*range((position // 16 + 1) * 16, len(tokens), 16), len(tokens)]
        starts = [position, *ends[:-1]]
        return [SpanPayload(at, end, (), {"x": blob}, compute_s, {}) for at, end in zip(starts, ends, strict=True)]

    return db.put(root, pack_tokens(tokens), 0, encode, **options)


def found(db, tokens, root=ROOT):
    known = {"model": root.weights_id, "tokenizer": root.tokenizer_id, "namespace": root.namespace}
    return db.lookup(list(tokens), **known).num_tokens


def charged(db):
    return db.usage()["charged_bytes"]


def lives(db):
    with db.read() as snapshot:
        return {node: Life.unpack(node, data) for node, data in snapshot.reader.scan(LIFE)}
