"""Encrypted stores: everything works as in plain ones, nothing can be read, moved or opened without the key."""

import logging
import random
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from promptdb import PromptDB
from promptdb.activations import Series
from promptdb.archive import Selection, export_nodes, import_archive
from promptdb.backup import backup, check_store
from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import SpanPayload
from promptdb.errors import (
    CorruptDataError,
    FormatVersionError,
    ReadOnlyStoreError,
    StoreError,
    StoreKeyError,
)
from promptdb.format import (
    ACTIVATIONS,
    BLOBS,
    CHILDREN,
    LABELS,
    LOGITS,
    META,
    NODES,
    OUTBOX,
    SEAL_KEY,
    STORE_KEY,
    TABLES,
    Group,
)
from promptdb.keys import Root, pack_tokens, unpack_tokens
from promptdb.life import charge
from promptdb.recordings import RecordedRows
from promptdb.sealed import SealedIndex
from promptdb.trie import cut
from promptdb.userkey import KEY_FILE_VARIABLE, KEY_VARIABLE

KEY, OTHER_KEY = "5e" * 32, "0d" * 32
# Nothing in the file may look like these.
ROOT = Root("a7" * 32, "b9" * 32)
TENANT = Root("a7" * 32, "b9" * 32, "tenant of a secret name")
PROMPT = [*range(70_000, 70_040)]
BRANCH = [*PROMPT[:20], 81_234, 81_235]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.delenv(KEY_FILE_VARIABLE, raising=False)


def put(db, tokens, root=ROOT, **options):
    """Store a prompt whose keys and values are its tokens, as floats, with logits after it; as archives want spans."""
    packed = pack_tokens(tokens)

    def encode(position):
        spans = []
        for start, end in cut(position, len(tokens), (), db.chunk_tokens):
            count = end - start
            floats = b"".join(map(row, tokens[start:end]))
            kv = build_blob([(TensorSpec("kv.0", "F32", (2, 1, count, 32)), floats)])
            zeros = bytes(4 * count)
            scores = [TensorSpec("token_logprobs", "F32", (count,)), TensorSpec("greedy_ids", "I32", (count,))]
            lp = build_blob([(spec, zeros) for spec in scores])
            layout = (Group((0, 1), 1, 32, "F32"),)
            spans.append(SpanPayload(start, end, layout, {"kv": kv, "lp": lp}, 0.5, {"torch": "a secret version"}))
        return spans

    logits = build_blob([(TensorSpec("logits", "F32", (100,)), float_bytes(tokens[-1]) * 100)])
    return db.put(root, packed, 0, encode, {len(tokens): logits}, **options)


def float_bytes(token):
    return struct.pack("<f", token)


@cache
def row(token):
    """What stands for the keys and values of a token."""
    source = random.Random(token)
    return float_bytes(token) + struct.pack("<63f", *(source.gauss() for _ in range(63)))


def lookup(db, tokens, root=ROOT):
    return db.lookup(tokens, model=root.weights_id, tokenizer=root.tokenizer_id, namespace=root.namespace)


def assert_holds(db, tokens, root=ROOT):
    """Everything of a prompt is there, and is what was put."""
    match = lookup(db, tokens, root)
    assert match.is_complete
    with db.read() as snapshot:
        for step in match.steps:
            record = snapshot.record(step.node)
            data = bytes(snapshot.blob(step.node, record, "kv")["kv.0"].data)
            span = list(unpack_tokens(record.span))
            assert data == b"".join(map(row, span))
            assert span[: step.num_tokens] == tokens[step.start : step.end]


def fill(db):
    put(db, PROMPT)
    put(db, BRANCH)
    put(db, BRANCH, TENANT, ttl_s=1e9)
    node = db.lookup(PROMPT, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).steps[0].node
    rows = build_blob([(TensorSpec("rows", "F32", (1, 2)), float_bytes(PROMPT[0]) * 2)])
    db.put_activations([RecordedRows(node, Series("post-mlp", 0, "F32"), bytearray(16) + rows)])
    db.artifacts.save("a secret result", columns={"a secret column": [1, 2]}, notes="a secret note")
    db.set_ttl(1e9, namespace=TENANT.namespace)
    db.pin(ROOT, BRANCH, name="a secret pin")
    db.tag("a secret tag", ROOT, PROMPT)
    db.registry.add_model(ROOT.weights_id, {"name": "a secret model"})
    db.registry.add_tokenizer(ROOT.tokenizer_id, {"name": "t", "json": '{"a secret": "vocabulary"}'})
    db.registry.add_checkpoint(
        b"\xc5" * 32, {"path": "/a/secret/path", "weights_id": ROOT.weights_id, "tokenizer_id": ""}
    )


def open_store(path, **options):
    return PromptDB(path, **({"key": KEY, "chunk_tokens": 16} | options))


@pytest.fixture
def path(tmp_path):
    with open_store(tmp_path / "store", map_bytes=1) as db:
        fill(db)
        assert db.verify() == []
    return tmp_path / "store"


def raw(db):
    """The tables below the encryption."""
    return db._index._inner


# Use


@pytest.mark.parametrize("readonly", [True, False])
def test_everything_is_there_again(path, readonly):
    with PromptDB(path, key=KEY, readonly=readonly, verify_reads="always") as db:
        assert db.is_encrypted
        for tokens, root in ((PROMPT, ROOT), (BRANCH, ROOT), (BRANCH, TENANT)):
            assert_holds(db, tokens, root)
        assert lookup(db, PROMPT, TENANT).num_tokens == 20
        assert lookup(db, [1, 2, 3]).num_tokens == 0
        assert (db.chunk_tokens, db.stat()["num_nodes"], db.stat()["num_roots"]) == (16, 6, 2)
        assert sorted(node for node, _ in db.nodes()) == [node for node, _ in db.nodes()]
        for node, record in db.nodes():
            assert db.find_node(node.hex()) == db.find_node(node.hex()[:9]) == node
            assert record.provenance == {"torch": "a secret version"}
        assert [label.name for label in db.pins()] == ["a secret pin"]
        assert db.artifacts.load("a secret result").notes == "a secret note"
        assert len(db.tagged("a secret tag")) == 3
        assert db.ttls() == {TENANT.namespace: 1e9}
        assert db.registry.models()[ROOT.weights_id]["name"] == "a secret model"
        assert db.verify() == []


def test_the_environment_gives_the_key(path, monkeypatch, tmp_path):
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    file.chmod(0o600)
    for name, value in ((KEY_VARIABLE, KEY), (KEY_FILE_VARIABLE, str(file))):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            with PromptDB(path) as db:
                assert_holds(db, PROMPT)
            with PromptDB(tmp_path / f"new{name}") as db:
                assert db.is_encrypted
            with PromptDB.in_memory() as db:
                assert not db.is_encrypted


def test_nothing_is_in_the_clear(path):
    """Neither tokens, texts, names, numbers nor identities are found in the bytes of the file, in any spelling."""
    content = (path / "data.mdb").read_bytes()
    assert len(content) > 50_000
    texts = ["secret", "tenant", ROOT.weights_id, ROOT.tokenizer_id, "weights_id", "kv.0", "cost", "token_logprobs"]
    needles = [text.encode() for text in texts] + [bytes.fromhex(ROOT.weights_id), KEY.encode(), bytes.fromhex(KEY)]
    with PromptDB(path, key=KEY) as db, db.read() as snapshot:
        needles += [pack_tokens(pair) for pair in {*pairwise(PROMPT), *pairwise(BRANCH)}]
        needles += [row(token)[:8] for token in {*PROMPT, *BRANCH}]
        for table in TABLES:
            for key, value in snapshot.reader.scan(table):
                if key in (STORE_KEY, SEAL_KEY):
                    continue
                needles += [key[:12], key[-12:]] if len(key) >= 32 and table != "queue" else []
                needles += [key[9:]] if table == "queue" else []
                needles += [bytes(value[16:48])] if len(value) > 48 else []
    needles = [needle for needle in needles if any(needle)]
    assert len(needles) > 200
    assert [needle for needle in needles if needle in content] == []
    with PromptDB(path.parent / "plain", key="", chunk_tokens=16) as plain:
        fill(plain)
    content = (path.parent / "plain" / "data.mdb").read_bytes()
    assert sum(needle in content for needle in needles) > 0.8 * len(needles)  # the search finds what is there


def test_what_is_stored_is_charged(path):
    """Every item as it is in the file, the seals too, to the byte; and a quota is held."""
    with PromptDB(path, key=KEY) as db:
        total = 256 * db.stat()["num_nodes"]
        with raw(db).read() as reader:
            for table in (NODES, CHILDREN, BLOBS, LOGITS, ACTIVATIONS):
                total += sum(charge(len(key), len(value)) for key, value in reader.scan(table))
        assert db.usage()["charged_bytes"] == total
        pinned = db.usage()["pinned_bytes"]
        db.set_quota(pinned + 100)
        assert db.usage()["charged_bytes"] == pinned
        assert_holds(db, BRANCH)
        assert db.verify() == []


def test_compressed_and_encrypted(tmp_path):
    with open_store(tmp_path / "both", compression="zstd", chunk_tokens=256) as db:
        long = [*range(500)]
        put(db, long)
        assert_holds(db, long)
        assert db.verify() == []
        both = db.usage()["charged_bytes"]
    with open_store(tmp_path / "one", chunk_tokens=256) as db:
        put(db, long)
        assert both < 0.92 * db.usage()["charged_bytes"]  # what is sealed does not shrink: it was packed before


def test_collecting_compacting_and_removing(path):
    with PromptDB(path, key=KEY) as db:
        for first in range(30):
            put(db, [first, 5, 6])
        before = db.stat()["num_nodes"]
        assert db.gc().num_evicted == 0
        assert db.remove(lookup(db, [3, 5, 6]).steps[0].node) == 1
        assert db.gc(0).num_evicted == before - 1 - 3
        assert (db.unpin(name="a secret pin"), db.untag("a secret tag")) == (1, 0)  # gc took the tag with its span
        report = db.compact()
        assert report.after_bytes <= report.before_bytes
        assert_holds(db, BRANCH)
        put(db, PROMPT)
        assert db.verify() == []
    with PromptDB(path, key=KEY) as db:
        assert_holds(db, PROMPT)
        assert db.verify() == []


def test_threads_and_handles_share_it(path):
    with PromptDB(path, key=KEY) as db, PromptDB(path, key=bytes.fromhex(KEY)) as other:

        def work(number):
            tokens = [number, *PROMPT]
            put(db if number % 2 else other, tokens)
            assert_holds(other if number % 2 else db, tokens)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(16)))
        assert db.verify() == []


# Keys


def test_no_key_and_wrong_keys(path, monkeypatch):
    before = (path / "data.mdb").read_bytes()
    for key, what in (
        (None, "there is no key"),
        ("", "there is no key"),
        (OTHER_KEY, "another key"),
        (b"\0" * 32, "another"),
    ):
        for readonly in (True, False):
            with pytest.raises(StoreKeyError, match=what) as caught:
                PromptDB(path, key=key, readonly=readonly)
            assert "PROMPTDB_KEY" in caught.value.hint
            assert str(key) not in str(caught.value) or not key
    monkeypatch.setenv(KEY_VARIABLE, OTHER_KEY)
    with pytest.raises(StoreKeyError):
        PromptDB(path)
    assert (path / "data.mdb").read_bytes() == before
    with PromptDB(path, key=KEY) as db:  # the argument counts, not the environment
        assert_holds(db, PROMPT)


def test_a_plain_store_with_a_key(tmp_path, monkeypatch):
    """Who gives a key must not be served by a store that anybody may have written in its place."""
    with PromptDB(tmp_path / "plain") as db:
        put(db, PROMPT)
        with pytest.raises(StoreKeyError, match="is not encrypted"):
            db.rotate_key(OTHER_KEY)
    for options in ({"key": KEY}, {"key": KEY, "readonly": True}):
        with pytest.raises(StoreKeyError, match="is not encrypted, but a key was given"):
            PromptDB(tmp_path / "plain", **options)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with pytest.raises(StoreKeyError, match="is not encrypted"):
        PromptDB(tmp_path / "plain")
    with PromptDB(tmp_path / "plain", key="") as db:
        assert_holds(db, PROMPT)


def test_rotation(path):
    with PromptDB(path, key=KEY) as db:
        stored = snapshot_of(db)
        db.rotate_key(OTHER_KEY)
        after = snapshot_of(db)
        assert {name for name in stored if stored[name] != after[name]} == {(META, SEAL_KEY)}
        assert_holds(db, PROMPT)
        put(db, [1, 2, 3])
    with pytest.raises(StoreKeyError, match="was the key rotated"):
        PromptDB(path, key=KEY)
    with PromptDB(path, key=OTHER_KEY) as db:
        for tokens in (PROMPT, BRANCH, [1, 2, 3]):
            assert_holds(db, tokens)
        for wrong in ("", "short", None):
            with pytest.raises(StoreKeyError):
                db.rotate_key(wrong)
        assert db.verify() == []
    with PromptDB(path, key=OTHER_KEY, readonly=True) as db, pytest.raises(ReadOnlyStoreError):
        db.rotate_key(KEY)


def snapshot_of(db):
    with raw(db).read() as reader:
        return {(table, key): bytes(value) for table in TABLES for key, value in reader.scan(table)}


def test_rotation_while_others_work(path):
    """Handles that are open go on: the data key is the same."""
    with PromptDB(path, key=KEY) as db:
        put_by_another = (
            "import sys, pathlib; sys.path.insert(0, 'tests'); from test_encrypted import *\n"
            f"with PromptDB({str(path)!r}, key=KEY) as db:\n"
            "    print('open', flush=True); sys.stdin.readline(); put(db, [9, 9, 9]); assert_holds(db, PROMPT)\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", put_by_another], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert child.stdout.readline() == "open\n"
        db.rotate_key(OTHER_KEY)
        child.communicate("go\n", timeout=60)
        assert child.returncode == 0
        assert_holds(db, [9, 9, 9])


def test_the_key_is_never_logged(path, caplog, capsys, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with caplog.at_level(logging.DEBUG):
        with PromptDB(path) as db:
            damage(db, BLOBS)
            db.verify(fix=True)
            db.rotate_key(OTHER_KEY)
            shown = repr(db) + repr(vars(db)["_index"]) + str(vars(db.registry))
        with pytest.raises(StoreKeyError) as caught:
            PromptDB(path)
    written = caplog.text + shown + str(caught.value) + "".join(capsys.readouterr())
    assert "damaged" in caplog.text
    for key in (KEY, OTHER_KEY):
        assert key not in written
        assert str(bytes.fromhex(key))[2:-1] not in written


def test_creating_at_once(tmp_path):
    """Of processes that create a store at the same moment with different keys, one wins and the others are told."""
    code = (
        "import sys; from promptdb import PromptDB; from promptdb.errors import StoreKeyError\n"
        "try:\n    PromptDB(sys.argv[1], key=sys.argv[2]).close(); print('mine')\n"
        "except StoreKeyError: print('refused')\n"
    )
    keys = ["11" * 32, "22" * 32, "", "33" * 32]
    children = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / "store", key], stdout=subprocess.PIPE, text=True)
        for key in keys
    ]
    said = [child.communicate(timeout=60)[0].strip() for child in children]
    assert sorted(said) == ["mine", "refused", "refused", "refused"]
    with PromptDB(tmp_path / "store", key=keys[said.index("mine")]) as db:
        assert db.verify() == []


# Attacks and damage


def damage(db, table, place=-1, number=0):
    """Flip a bit of a stored value."""

    def flip(writer):
        key = list(writer.keys(table))[number]
        value = bytearray(writer.get(table, key))
        value[place] ^= 4
        writer.put(table, key, value)

    raw(db).transact(flip)


def test_swapped_values_are_misses(path):
    """Whoever can write the file can put values under other keys: nothing is served from there."""
    for table in (CHILDREN, NODES, BLOBS):
        copied = Path(shutil.copytree(path, path.parent / f"swapped {table}"))
        with PromptDB(copied, key=KEY) as db:

            def rotate(writer, table=table):
                keys = list(writer.keys(table))
                values = [bytes(writer.get(table, key)) for key in keys]
                for key, value in zip(keys, values[1:] + values[:1], strict=True):
                    writer.put(table, key, value)

            raw(db).transact(rotate)
            for tokens in (PROMPT, BRANCH):
                with pytest.raises((CorruptDataError, AssertionError, AttributeError)):
                    assert_holds(db, tokens)
            assert {problem.table for problem in db.verify(fix=True)} >= {table}
            assert db.verify() == []
            put(db, PROMPT)
            assert_holds(db, PROMPT)


@pytest.mark.parametrize("table", sorted(set(TABLES) - {LABELS, OUTBOX}))
def test_damaged_values_are_found_and_repaired(path, table):
    with PromptDB(path, key=KEY) as db:
        if table == META:
            with raw(db).read() as reader:
                keys = [key for key in reader.keys(META) if key not in (STORE_KEY, SEAL_KEY)]
            raw(db).transact(lambda writer: writer.put(META, keys[0], bytes(writer.get(META, keys[0]))[:-1]))
        else:
            damage(db, table)
        problems = db.verify()
        assert table == "queue" or table in {problem.table for problem in problems}
        db.verify(fix=True)
        assert db.verify() == []
        put(db, PROMPT)
        assert_holds(db, PROMPT)


@pytest.mark.parametrize("table", sorted(set(TABLES) - {META, OUTBOX}))
def test_damaged_keys_are_found_and_repaired(path, table):
    with PromptDB(path, key=KEY) as db:

        def change(writer):
            key = next(writer.keys(table))
            value = bytes(writer.get(table, key))
            writer.delete(table, key)
            writer.put(table, key[:-1] + bytes([key[-1] ^ 1]), value)

        raw(db).transact(change)
        assert table in {problem.table for problem in db.verify()}
        db.verify(fix=True)
        assert db.verify() == []
        put(db, PROMPT)
        assert_holds(db, PROMPT)


def test_random_damage_never_gives_a_wrong_tensor(path):
    source = random.Random(7)
    with PromptDB(path, key=KEY, verify_reads="never") as db:  # the seals alone
        clean = snapshot_of(db)
        for _ in range(150):
            (table, key), value = source.choice(
                [item for item in clean.items() if item[0][1] not in (STORE_KEY, SEAL_KEY)]
            )
            changed = bytearray(value)
            changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
            raw(db).transact(lambda writer, t=table, k=key, v=changed: writer.put(t, k, v))
            for tokens, root in ((PROMPT, ROOT), (BRANCH, ROOT), (BRANCH, TENANT)):
                try:
                    match = lookup(db, tokens, root)
                    with db.read() as snapshot:
                        for step in match.steps:
                            record = snapshot.record(step.node)
                            found = snapshot.blob(step.node, record, "kv")["kv.0"].data
                            assert bytes(found[:4]) == float_bytes(tokens[step.start])
                except CorruptDataError:
                    continue
            raw(db).transact(lambda writer, t=table, k=key, v=value: writer.put(t, k, v))
        assert db.verify() == []


def test_damaged_logits_keep_the_accounting(path):
    """Whose logits they were is sealed with them: it is found out from the other side."""
    with PromptDB(path, key=KEY) as db:
        for number in range(3):
            damage(db, LOGITS, number=number)
        with db.read() as snapshot:
            digests = list(snapshot.reader.keys(LOGITS))
        roots = {lookup(db, tokens, root).root for tokens, root in ((PROMPT, ROOT), (BRANCH, TENANT))}
        by_digest = {}
        from promptdb.keys import prefix_digests

        for root, tokens in ((ROOT, PROMPT), (ROOT, BRANCH), (TENANT, BRANCH)):
            (digest,) = prefix_digests(root.digest, pack_tokens(tokens), [len(tokens)])
            by_digest[digest] = root
        assert set(by_digest) == set(digests)
        assert len(roots) == 2
        for digest, root in by_digest.items():
            assert db.remove_logits(root, digest)
        assert db.verify() == []


def test_a_damaged_data_key_is_no_wrong_key(path):
    with PromptDB(path, key=KEY) as db:
        damage_seal = bytearray(snapshot_of(db)[META, SEAL_KEY])
        damage_seal[40] ^= 1
        raw(db).transact(lambda writer: writer.put(META, SEAL_KEY, damage_seal))
    with pytest.raises(CorruptDataError, match="checksum"):
        PromptDB(path, key=KEY)


def test_a_store_without_its_seal(path):
    """Somebody took the record away, so that the store looks plain: neither with a key nor without is it used."""
    with PromptDB(path, key=KEY) as db:
        raw(db).transact(lambda writer: writer.delete(META, SEAL_KEY))
    with pytest.raises(StoreKeyError, match="is not encrypted"):
        PromptDB(path, key=KEY)
    with PromptDB(path, key="") as db:
        assert lookup(db, PROMPT).num_tokens == 0
        assert db.verify() != []


# Moving


def test_archives_are_plain_and_go_both_ways(path, tmp_path):
    with PromptDB(path, key=KEY) as db:
        export_nodes(db, Selection(namespace=""), tmp_path / "archive")
    assert pack_tokens(PROMPT[:16]) in (tmp_path / "archive").read_bytes()
    for key in ("", OTHER_KEY):
        with open_store(tmp_path / f"new{key}", key=key) as db:
            assert import_archive(db, tmp_path / "archive").spans_stored == 4
            for tokens in (PROMPT, BRANCH):
                assert_holds(db, tokens)
            assert db.verify() == []


def test_backups_are_encrypted(path, tmp_path):
    with PromptDB(path, key=KEY) as db:
        report = backup(db, tmp_path / "backup", compact=True)
        assert report.num_spans == 6
        db.rotate_key(OTHER_KEY)
    with PromptDB(tmp_path / "backup", key=KEY, readonly=True) as db:  # made before the key was rotated
        assert_holds(db, PROMPT)
    with pytest.raises(StoreKeyError, match="there is no key"):
        check_store(tmp_path / "backup")
    assert check_store(tmp_path / "backup", key=KEY) == ([], 6)
    assert b"secret" not in (tmp_path / "backup" / "data.mdb").read_bytes()


# Versions and libraries


def test_a_program_of_the_version_before_refuses_it(path, monkeypatch):
    monkeypatch.setattr("promptdb.opening.FORMAT_VERSION", 2)
    for key in (KEY, ""):
        with pytest.raises(FormatVersionError, match="upgrade promptdb"):
            PromptDB(path, key=key)


def test_without_the_library(path, tmp_path):
    code = f"""
import sys
sys.modules["cryptography"] = None
from promptdb import PromptDB
from promptdb.errors import MissingLibraryError, StoreKeyError
for path in ({str(path)!r}, {str(tmp_path / "new")!r}):
    try:
        PromptDB(path, key={KEY!r})
    except MissingLibraryError as error:
        print(error.hint)
try:
    PromptDB({str(path)!r})
except StoreKeyError as error:
    print(error.message)
PromptDB({str(tmp_path / "plain")!r}).close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["pip install 'promptdb[encryption]'"] * 2
    assert "is encrypted, and there is no key" in lines[2]


def test_plain_stores_do_not_need_it(tmp_path):
    code = f"""
import sys
from promptdb import PromptDB
with PromptDB({str(tmp_path / "plain")!r}) as db:
    db.verify()
assert not {{"cryptography", "zstandard", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_unknown_cipher(path, monkeypatch):
    monkeypatch.setattr("promptdb.sealed.CIPHERS", "ROT-13")
    with pytest.raises(FormatVersionError, match="upgrade"):
        PromptDB(path, key=KEY)


def test_types(tmp_path):
    with pytest.raises(TypeError):
        PromptDB(tmp_path / "store", key=7)
    with pytest.raises(StoreError):
        PromptDB(tmp_path / "store", key="short")
    assert not (tmp_path / "store").exists()
    assert isinstance(open_store(tmp_path / "store")._index, SealedIndex)
