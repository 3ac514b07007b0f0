"""Stores of every format version ever released stay readable, to the byte."""

import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3

from promptdb import PromptDB
from promptdb.activations import Series, entry_of, series_of
from promptdb.blobs import TensorSpec, build_blob
from promptdb.format import FORMAT_VERSION, META, STORE_KEY, TABLES, BlobEntry, Group, unpack_record
from promptdb.keys import Root, pack_tokens, prefix_digests
from promptdb.recordings import RecordedRows
from promptdb.testing import encode_tokens

DATA = Path(__file__).parent / "data"
SCRIPT = Path(__file__).parents[1] / "scripts" / "make_old_store.py"
# A digest of all keys and values: nobody may change what stands for the stores that users have.
VERSIONS = {
    1: "a5d285395f13e0fffcf9e8170aeb19e002d6eb7bbe812f7f42759d55a4dda799",
    2: "eecebfe2e5ba512d15431383353dd3500e25380823b998a096d9328788bb5451",
    3: "a0841c8db62d05f80151c358317932c19089d7e1373498034057b6e7e6ae823a",
}

ROOT = Root("a1" * 32, "b2" * 32)
TENANT = Root("a1" * 32, "b2" * 32, "tenant", "c3" * 32)
PROMPT = [*range(100, 138), 2**32 - 1, 0]
BRANCH = [*range(100, 110), 7, 7, 7]
SPANS = [(0, 5), (5, 16), (16, 32), (32, 40)]


@pytest.fixture(params=sorted(VERSIONS))
def version(request):
    return request.param


@pytest.fixture
def old(version, tmp_path):
    """A copy: even reading writes a lock file."""
    return Path(shutil.copytree(DATA / f"store-v{version}", tmp_path / "store"))


def content_digest(path):
    digest = blake3()
    with PromptDB(path, readonly=True) as db, db.read() as snapshot:
        for table in TABLES:
            for key, value in snapshot.reader.scan(table):
                digest.update(f"{table} {key.hex()} {bytes(value).hex()}\n".encode())
    return digest.hexdigest()


def lookup(db, tokens, root=ROOT):
    return db.lookup(
        tokens,
        model=root.weights_id,
        tokenizer=root.tokenizer_id,
        namespace=root.namespace,
        intervention=root.intervention_id,
    )


def test_there_is_one_of_each_version():
    assert sorted(VERSIONS) == list(range(1, FORMAT_VERSION + 1))
    assert sorted(path.name for path in DATA.glob("store-*")) == [f"store-v{version}" for version in VERSIONS]


def test_nothing_was_changed(old, version):
    assert content_digest(old) == VERSIONS[version]


def test_the_current_version_writes_the_same(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "new"], check=True, timeout=60, capture_output=True)
    assert done.stdout.startswith(b"format %d" % FORMAT_VERSION)
    assert content_digest(tmp_path / "new") == VERSIONS[FORMAT_VERSION]


@pytest.mark.parametrize("readonly", [True, False])
def test_settings_and_totals(old, version, readonly):
    with PromptDB(old, readonly=readonly, verify_reads="always") as db:
        assert db.verify() == []
        assert (db.chunk_tokens, db.created_unix_s) == (16, 1_700_000_000.0)
        with db.read() as snapshot:
            assert unpack_record(STORE_KEY, snapshot.reader.get(META, STORE_KEY))["format_version"] == version
        totals = {root: (amounts["num_nodes"], amounts["num_tokens"]) for root, amounts in db.roots()}
        assert totals == {ROOT: (5, 43), TENANT: (1, 13)}


def test_lookups(old):
    with PromptDB(old, readonly=True) as db:
        match = lookup(db, PROMPT)
        assert match.is_complete
        assert [(step.start, step.end) for step in match.steps] == SPANS
        branch = lookup(db, BRANCH)
        assert [(step.start, step.num_tokens, step.span_tokens) for step in branch.steps] == [
            (0, 5, 5),
            (5, 5, 11),
            (10, 3, 3),
        ]
        assert not branch.has_logits
        assert lookup(db, BRANCH, TENANT).num_tokens == 13
        assert lookup(db, BRANCH[:3], TENANT).is_complete
        assert lookup(db, BRANCH, Root("a1" * 32, "b2" * 32, "tenant")).num_tokens == 0
        assert lookup(db, [*PROMPT[:20], 1]).num_tokens == 20


def test_records_and_tensors(old):
    with PromptDB(old, readonly=True, verify_reads="always") as db, db.read() as snapshot:
        parent = b""
        for step, (start, end) in zip(lookup(db, PROMPT).steps, SPANS, strict=True):
            record = snapshot.record(step.node)
            assert (record.root, record.parent, record.start, record.end) == (ROOT, parent, start, end)
            assert record.span == pack_tokens(PROMPT[start:end])
            assert record.layout == (Group((0, 1), 2, 4, "F32"), Group((2, 3), 1, 2, "BF16"))
            assert (record.created_unix_s, record.compute_s) == (1_700_000_000.0, 0.5)
            assert record.provenance == {"torch": "2.13.0"}
            assert set(record.blobs) == {"kv", "lp"}
            assert all(isinstance(entry, BlobEntry) for entry in record.blobs.values())
            tensors = snapshot.blob(step.node, record, "kv")
            for number, group in enumerate(record.layout):
                tensor = tensors[f"kv.{number}"]
                assert (tensor.dtype, tensor.shape) == (group.dtype, (2, group.kv_heads, end - start, group.head_dim))
                assert list(tensor.floats()) == [
                    (slot + 1) * (head + 1) + (position % 8) / 8 - element
                    for slot in group.slots
                    for head in range(group.kv_heads)
                    for position in range(start, end)
                    for element in range(group.head_dim)
                ]
            scores = list(snapshot.blob(step.node, record, "lp")["token_logprobs"].floats())
            if start == 0:
                assert math.isnan(scores.pop(0))
                start = 1
            assert scores == [-position / 4 for position in range(start, end)]
            parent = step.node


def test_logits(old):
    with PromptDB(old, readonly=True) as db, db.read() as snapshot:
        (digest,) = prefix_digests(ROOT.digest, pack_tokens(PROMPT), [40])
        tensor = snapshot.logits(digest)
        assert (tensor.dtype, tensor.shape) == ("F32", (6,))
        assert bytes(tensor.data) == struct.pack("<6f", *range(6))
        assert snapshot.logits(bytes(32)) is None


def test_registry(old):
    with PromptDB(old, readonly=True) as db:
        assert db.registry.models() == {
            "a1" * 32: {
                "name": "tiny",
                "num_layers": 2,
                "dtype": "F32",
                "first_seen_unix_s": 1_700_000_000.0,
                "compute_tokens_per_s": 1000.0,
            }
        }
        assert db.registry.tokenizer("b2" * 32) == {"name": "bytes", "json": '{"model": "é"}', "verbatim": True}
        assert db.registry.checkpoint(bytes(range(32))) == {"weights_id": "a1" * 32}


def test_it_is_written_on(old, version):
    with PromptDB(old) as db:
        with db.read() as snapshot:  # opening changes nothing
            assert unpack_record(STORE_KEY, snapshot.reader.get(META, STORE_KEY))["format_version"] == version
        longer = [*PROMPT, 5, 6]
        packed = pack_tokens(longer)
        assert db.put(ROOT, packed, 40, encode_tokens(packed, (), 16)).num_tokens == 2
        assert lookup(db, longer).num_tokens == 42
        assert db.remove(lookup(db, PROMPT).steps[1].node) == 5
        assert lookup(db, longer).num_tokens == 5
        assert db.verify() == []
        with db.read() as snapshot:  # version 3 is for those that hold activations
            found = unpack_record(STORE_KEY, snapshot.reader.get(META, STORE_KEY))["format_version"]
        assert found == max(version, 2)


def test_looking_up_does_not_change_the_version(old, version):
    with PromptDB(old) as db:
        assert lookup(db, PROMPT).is_complete
        assert ("charged_bytes" in db.stat()) == (version > 1)
    with PromptDB(old, readonly=True) as db, db.read() as snapshot:
        assert unpack_record(STORE_KEY, snapshot.reader.get(META, STORE_KEY))["format_version"] == version


def test_limits_work(old, version):
    """What an older version did not know of a store is found out once, and then holds."""
    with PromptDB(old) as db:
        db.pin(ROOT, BRANCH)
        db.set_ttl(60.0, namespace="other")
        charged = db.stat()["charged_bytes"]
        assert db.verify() == []
        db.set_quota(charged - 1)
        assert db.stat()["charged_bytes"] < charged
        assert lookup(db, BRANCH).num_tokens == len(BRANCH)
        assert db.stat()["num_nodes"] < 6
        assert db.gc(0).num_evicted > 0
        assert db.stat()["num_nodes"] == 3  # those that are pinned
        assert db.verify() == []
    with PromptDB(old) as db:
        assert db.limits().quota_bytes == charged - 1
        assert db.verify() == []


def test_what_version_2_added(tmp_path):
    old = Path(shutil.copytree(DATA / "store-v2", tmp_path / "store"))
    with PromptDB(old, readonly=True) as db:
        assert (db.limits().quota_bytes, db.limits().policy) == (1 << 20, "lru")
        assert db.ttls() == {"tenant": 3.0e9}
        (pin,) = db.pins()
        assert (pin.name, pin.num_tokens, pin.expires_unix_s) == ("branch", 13, 4.7e9)
        (tag,) = db.tags()
        assert (tag.name, tag.num_tokens, tag.expires_unix_s) == ("é", 40, math.inf)
        assert len(db.tagged("é")) == 4
        assert db.stat()["charged_bytes"] == 6 * 256 + sum_of_items(db)
    with PromptDB(old, clock=lambda: 4.8e9) as db:
        assert lookup(db, BRANCH, TENANT).num_tokens == 0
        assert lookup(db, BRANCH).num_tokens == 13
        assert (db.pins(), db.gc().num_expired) == ([], 1)


def test_what_version_3_added(tmp_path):
    old = Path(shutil.copytree(DATA / "store-v3", tmp_path / "store"))
    with PromptDB(old, readonly=True) as db, db.read() as snapshot:
        node = lookup(db, PROMPT).steps[1].node
        assert list(series_of(snapshot.reader, node)) == [
            Series("post-mlp", 0, "F32"),
            Series("post-mlp", 1, "F32"),
        ]
        whole = entry_of(snapshot, node, Series("post-mlp", 0, "F32"), 11)
        assert (whole.rows.shape, list(whole.tokens())) == ((11, 3), list(range(11)))
        assert list(whole.rows.floats()) == [offset + element / 4 for offset in range(11) for element in range(3)]
        part = entry_of(snapshot, node, Series("post-mlp", 1, "F32"), 11)
        assert (list(part.tokens()), list(part.rows.floats())) == ([2, 7], [102, 102.25, 102.5, 107, 107.25, 107.5])


def test_activations_raise_the_version_of_an_older_store(old, version):
    with PromptDB(old) as db:
        node = lookup(db, PROMPT).steps[0].node
        blob = build_blob([(TensorSpec("rows", "F32", (1, 2)), struct.pack("<2f", 1, 2))])
        rows = RecordedRows(node, Series("post-mlp", 7, "F32"), bytearray(16) + blob)
        assert db.put_activations([rows]).num_entries == 1
        assert db.put_activations([rows]).num_entries == 0
        with db.read() as snapshot:
            assert unpack_record(STORE_KEY, snapshot.reader.get(META, STORE_KEY))["format_version"] == 3
        assert db.verify() == []
        db.remove(node)
        assert db.verify() == []


def sum_of_items(db):
    """All that FORMAT.md charges, as it says: keys and values, and whole pages of what is large."""
    total = 0
    with db.read() as snapshot:
        for table in ("nodes", "children", "blobs", "logits"):
            for key, value in snapshot.reader.scan(table):
                size = len(value)
                total += len(key) + (size if len(key) + size <= 2030 else (size + 16 + 4095) // 4096 * 4096)
    return total
