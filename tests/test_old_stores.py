"""Stores of every format version ever released stay readable, to the byte."""

import math
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3
from cli_tools import run, run_json

from promptdb import PromptDB
from promptdb.activations import Series, entry_of, series_of
from promptdb.blobs import TensorSpec, build_blob
from promptdb.errors import FormatVersionError, StoreError
from promptdb.format import (
    FORMAT_VERSION,
    LOGITS,
    META,
    SEAL_KEY,
    STORE_KEY,
    TABLES,
    BlobEntry,
    Group,
    unpack_record,
)
from promptdb.keys import Root, pack_tokens, prefix_digests
from promptdb.migrate import migrate
from promptdb.packing import is_packed, unpack
from promptdb.recordings import RecordedRows
from promptdb.testing import encode_tokens

DATA = Path(__file__).parent / "data"
SCRIPT = Path(__file__).parents[1] / "scripts" / "make_old_store.py"
# A digest of all keys and values: nobody may change what stands for the stores that users have.
VERSIONS = {
    1: "a5d285395f13e0fffcf9e8170aeb19e002d6eb7bbe812f7f42759d55a4dda799",
    2: "eecebfe2e5ba512d15431383353dd3500e25380823b998a096d9328788bb5451",
    3: "35fdc2aabe7cb2269d37b3cda83d742f5c008ab56b01d3c3f0ed352a582b8449",
}
# Of version 3 is what is compressed or encrypted; whatever is neither stays of this one.
PLAIN_VERSION = 2
KEY = "0123456789abcdef" * 4

ROOT = Root("a1" * 32, "b2" * 32)
TENANT = Root("a1" * 32, "b2" * 32, "tenant", "c3" * 32)
PROMPT = [*range(100, 138), 2**32 - 1, 0]
BRANCH = [*range(100, 110), 7, 7, 7]
SPANS = [(0, 5), (5, 16), (16, 32), (32, 40)]


@pytest.fixture(params=sorted(VERSIONS))
def version(request):
    return request.param


@pytest.fixture
def old(version, tmp_path, monkeypatch):
    """A copy: even reading writes a lock file."""
    if version == 3:
        monkeypatch.setenv("PROMPTDB_KEY", KEY)
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
    assert done.stdout.startswith(b"format %d" % PLAIN_VERSION)
    assert content_digest(tmp_path / "new") == VERSIONS[PLAIN_VERSION]


def test_the_current_version_writes_the_same_but_for_random_numbers(tmp_path, monkeypatch):
    """Of an encrypted store, what is decrypted, but for its key; of a compressed blob, what it holds."""
    command = [sys.executable, SCRIPT, tmp_path / "new", "--coded"]
    done = subprocess.run(command, check=True, timeout=60, capture_output=True)
    assert done.stdout.startswith(b"format %d" % FORMAT_VERSION)
    monkeypatch.setenv("PROMPTDB_KEY", KEY)
    contents = []
    for path in (tmp_path / "new", Path(shutil.copytree(DATA / "store-v3", tmp_path / "old"))):
        with PromptDB(path, readonly=True) as db, db.read() as snapshot:
            content = {(table, key): bytes(value) for table in TABLES for key, value in snapshot.reader.scan(table)}
        packed = {key for key, value in content.items() if key[0] == LOGITS and is_packed(value[48:])}
        assert len(packed) == 1
        for key in packed:
            content[key] = bytes(unpack(memoryview(content[key])[48:]))
        for key in ((META, SEAL_KEY), (META, b"usage")):  # the latter has the compressed size
            del content[key]
        # Sizes of what is compressed are in the totals and in the entry of its span.
        contents.append({key: value for key, value in content.items() if key[0] not in ("roots", "life")})
    assert contents[0] == contents[1]


@pytest.mark.parametrize("readonly", [True, False])
def test_settings_and_totals(old, version, readonly):
    if not readonly and version < PLAIN_VERSION:
        return  # it is not written to
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


def format_version(path):
    with PromptDB(path, readonly=True) as db, db.read() as snapshot:
        return unpack_record(STORE_KEY, snapshot.reader.get(META, STORE_KEY))["format_version"]


def everything(path):
    """All keys and values of the tables that every version has, but for the settings."""
    common = (name for name in TABLES if name not in (META, "life", "queue", "labels"))
    with PromptDB(path, readonly=True) as db, db.read() as snapshot:
        return {name: [(key, bytes(value)) for key, value in snapshot.reader.scan(name)] for name in common}


def test_an_older_store_is_not_written_to(old, version):
    if version >= PLAIN_VERSION:
        with PromptDB(old):
            return
    with pytest.raises(FormatVersionError, match="promptdb migrate"):
        PromptDB(old)
    assert format_version(old) == version
    assert content_digest(old) == VERSIONS[version]


@pytest.mark.parametrize("keep", [False, True])
def test_migration(old, version, keep):
    before = everything(old)
    report = migrate(old, keep=keep)
    assert (report.from_version, report.to_version, report.num_removed) == (version, max(version, PLAIN_VERSION), 0)
    assert format_version(old) == max(version, PLAIN_VERSION)
    assert everything(old) == before
    kept = old / f"data.mdb.v{version}"
    assert kept.exists() == (keep and version < PLAIN_VERSION) == (report.kept is not None)
    with PromptDB(old) as db:
        assert db.verify() == []
        longer = [*PROMPT, 5, 6]
        packed = pack_tokens(longer)
        assert db.put(ROOT, packed, 40, encode_tokens(packed, (), 16)).num_tokens == 2
        assert lookup(db, longer).num_tokens == 42
        assert db.remove(lookup(db, PROMPT).steps[1].node) == 5
        assert lookup(db, longer).num_tokens == 5
        assert db.verify() == []
    assert migrate(old).from_version == max(version, PLAIN_VERSION)
    if kept.exists():  # as it was: put it back, and it is the old store
        kept.replace(old / "data.mdb")
        (old / "lock.mdb").unlink(missing_ok=True)
        assert format_version(old) == version
        assert everything(old) == before


def test_a_migration_that_is_killed_begins_again(tmp_path):
    """At each step that it takes on the disk: the store is the old one or the new one, and whole."""
    script = """
import os, sys
from pathlib import Path
from promptdb import environment, index
from promptdb.migrate import migrate
step = int(sys.argv[2])

def dying(name, owner, number, before):
    work = getattr(owner, name)
    def wrapped(*arguments, **options):
        if before and step == number:
            os._exit(9)
        result = work(*arguments, **options)
        if not before and step == number:
            os._exit(9)
        return result
    setattr(owner, name, wrapped)

dying("write_copy", environment, 0, False)
dying("_change_copy", index, 1, False)
dying("_check_copy", index, 2, False)
dying("hardlink_to", Path, 3, False)
dying("replace", Path, 4, False)
dying("sync_directory", environment, 5, False)
migrate(sys.argv[1])
"""
    whole = everything(shutil.copytree(DATA / "store-v1", tmp_path / "whole"))
    for step in range(6):
        old = Path(shutil.copytree(DATA / "store-v1", tmp_path / f"store-{step}"))
        done = subprocess.run([sys.executable, "-c", script, old, str(step)], timeout=60)
        assert done.returncode == 9, f"step {step} is not taken"
        assert format_version(old) == (1 if step < 4 else 2)
        assert everything(old) == whole
        migrate(old)
        assert format_version(old) == 2
        with PromptDB(old) as db:
            assert db.verify() == []
            assert lookup(db, PROMPT).is_complete


def test_a_migration_leaves_out_what_is_damaged(tmp_path):
    old = Path(shutil.copytree(DATA / "store-v1", tmp_path / "store"))
    data = bytearray((old / "data.mdb").read_bytes())
    with PromptDB(old, readonly=True) as db, db.read() as snapshot:
        _, blob = next(snapshot.reader.scan("blobs"))
        at = data.index(bytes(blob))
    data[at + 20] ^= 1
    (old / "data.mdb").write_bytes(data)
    report = migrate(old)
    assert report.num_removed == 1
    assert report.kept.exists()
    with PromptDB(old) as db:
        assert db.verify() == []
        assert db.stat()["num_nodes"] == 5


def test_a_migration_is_refused_while_others_have_the_store_open(tmp_path):
    old = Path(shutil.copytree(DATA / "store-v1", tmp_path / "store"))
    script = """
import sys
from promptdb import PromptDB
with PromptDB(sys.argv[1], readonly=True):
    print("ready", flush=True)
    input()
"""
    process = subprocess.Popen([sys.executable, "-c", script, old], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    with pytest.raises(StoreError, match="open in other processes"):
        migrate(old)
    process.communicate(b"\n", timeout=60)
    assert content_digest(old) == VERSIONS[1]
    migrate(old)


def test_the_command_that_migrates(tmp_path):
    old = Path(shutil.copytree(DATA / "store-v1", tmp_path / "store"))
    assert "promptdb migrate" in run("limits", "--db", old, "--quota", "1GB", code=2).stderr
    assert "6 spans" in run("verify", "--db", old).stdout or run_json("stat", "--db", old)["num_nodes"] == 6
    assert "2 now; everything holds" in run("migrate", "--db", old).stdout
    assert "nothing to do" in run("migrate", "--db", old).stdout
    assert run_json("limits", "--db", old, "--quota", "1GB")["quota_bytes"] == 10**9
    assert "there is no store" in run("migrate", "--db", tmp_path / "none", code=2).stderr


def test_limits_work(old, version):
    """What an older version did not know of a store is found out once, and then holds."""
    migrate(old)
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


def test_what_version_3_added(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTDB_KEY", KEY)
    old = Path(shutil.copytree(DATA / "store-v3", tmp_path / "store"))
    with PromptDB(old, readonly=True, verify_reads="always") as db, db.read() as snapshot:
        assert (db.is_encrypted, db.limits().compression) == (True, "zstd")
        (digest,) = prefix_digests(ROOT.digest, pack_tokens(PROMPT), [20])
        source = random.Random(3)
        expected = struct.pack("<20000f", *(source.gauss() for _ in range(20_000)))
        assert bytes(snapshot.logits(digest).data) == expected
        assert snapshot.reader.size(LOGITS, digest) < len(expected)
    content = (old / "data.mdb").read_bytes()
    assert b"tenant" not in content
    assert pack_tokens(PROMPT[:5]) not in content
    assert pack_tokens(PROMPT[:5]) in (DATA / "store-v2" / "data.mdb").read_bytes()


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


def test_activations_of_version_3(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTDB_KEY", KEY)
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
    migrate(old)
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
