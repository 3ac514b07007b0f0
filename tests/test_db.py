"""PromptDB: what it refuses, what it notices, what it counts."""

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import pytest

from promptdb import PromptDB
from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import SpanPayload
from promptdb.errors import (
    CorruptDataError,
    FormatVersionError,
    InputTypeError,
    NodeNotFoundError,
    NotAStoreError,
    PromptError,
    ReadOnlyStoreError,
    StoreError,
    StoreFullError,
    TokenRangeError,
)
from promptdb.format import (
    BLOBS,
    CHILDREN,
    FORMAT_VERSION,
    LIFE,
    LOGITS,
    META,
    MODELS,
    NODES,
    ROOTS,
    STORE_KEY,
    TABLES,
    pack_record,
    unpack_record,
)
from promptdb.keys import Root, pack_tokens
from promptdb.opening import PATH_VARIABLE, default_path
from promptdb.testing import encode_tokens, scratch_directory

ROOT = Root("aa" * 32, "bb" * 32)
LOGITS_BLOB = bytes(build_blob([(TensorSpec("logits", "F32", (4,)), bytes(16))]))


def put(db, tokens, *, boundaries=(), logits=(), root=ROOT):
    packed = pack_tokens(tokens)
    encode = encode_tokens(packed, boundaries, db.chunk_tokens)
    return db.put(root, packed, 0, encode, dict.fromkeys(logits, LOGITS_BLOB))


def lookup(db, tokens):
    return db.lookup(tokens, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id)


def read_tokens(db, tokens):
    """Read what is stored of a prompt, blob by blob."""
    found = b""
    with db.read() as snapshot:
        for step in snapshot.match(ROOT, pack_tokens(tokens)).steps:
            record = snapshot.record(step.node)
            found += bytes(snapshot.blob(step.node, record, "tokens")["tokens"].data)[: 4 * step.num_tokens]
    return found


@contextlib.contextmanager
def raw(path, write=True):
    """Open the LMDB file behind promptdb's back."""
    env = lmdb.open(str(path), max_dbs=32, map_size=1 << 30)
    try:
        with env.begin(write=write) as transaction:
            yield lambda table: (env.open_db(table.encode(), txn=transaction, create=False), transaction)
    finally:
        env.close()


# Opening


def test_a_new_store(store_path):
    with PromptDB(store_path) as db:
        assert (db.path, db.readonly, db.chunk_tokens) == (store_path, False, 256)
        assert abs(db.created_unix_s - time.time()) < 100
        assert db.stat()["num_nodes"] == 0
        assert db.verify() == []
        assert repr(db) == f"PromptDB({str(store_path)!r})"
    assert stat.S_IMODE(store_path.stat().st_mode) == 0o700
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in store_path.iterdir()} == {
        "data.mdb": 0o600,
        "lock.mdb": 0o600,
    }


def test_parents_are_made(tmp_path):
    with PromptDB(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / "data.mdb").exists()


def test_default_path(monkeypatch, tmp_path):
    monkeypatch.setenv(PATH_VARIABLE, str(tmp_path / "here"))
    assert default_path() == tmp_path / "here"
    with PromptDB() as db:
        assert db.path == tmp_path / "here"
    monkeypatch.delenv(PATH_VARIABLE)
    assert default_path().name == "default.promptdb"


def test_settings_agree(store_path):
    with PromptDB(store_path, chunk_tokens=32) as db, PromptDB(store_path) as other:
        assert other.chunk_tokens == db.chunk_tokens == 32
        with pytest.raises(StoreError, match="chunk_tokens=32, not 64"):
            PromptDB(store_path, chunk_tokens=64)
        with PromptDB(store_path, chunk_tokens=32) as third:
            assert third.chunk_tokens == 32


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"chunk_tokens": 0}, StoreError),
        ({"chunk_tokens": -5}, StoreError),
        ({"chunk_tokens": 2**21}, StoreError),
        ({"chunk_tokens": "8"}, InputTypeError),
        ({"chunk_tokens": True}, InputTypeError),
        ({"map_bytes": 0}, StoreError),
        ({"map_bytes": 2**60}, StoreError),
        ({"map_bytes": 1.5}, InputTypeError),
        ({"verify_reads": "sometimes"}, StoreError),
    ],
    ids=str,
)
def test_options_that_cannot_be(store_path, options, error):
    with pytest.raises(error):
        PromptDB(store_path, **options)
    assert not store_path.exists()
    with PromptDB(store_path):
        pass
    with pytest.raises(error):
        PromptDB(store_path, readonly=True, **options)
    with PromptDB(store_path) as db:  # the refused handle holds nothing
        put(db, [1])


@pytest.mark.parametrize("path", [7, b"bytes", ["a"]], ids=str)
def test_path_of_another_type(path):
    with pytest.raises(InputTypeError, match="path must be a str or a path"):
        PromptDB(path)


def test_path_is_empty():
    with pytest.raises(NotAStoreError, match="empty"):
        PromptDB("")


@pytest.mark.parametrize("readonly", [False, True])
def test_path_is_a_file(tmp_path, readonly):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotAStoreError, match="is a file"):
        PromptDB(tmp_path / "file", readonly=readonly)
    with pytest.raises(StoreError):
        PromptDB(tmp_path / "file" / "below", readonly=readonly)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("readonly", [False, True])
def test_path_is_a_directory_of_something_else(tmp_path, readonly):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(NotAStoreError, match="something else"):
        PromptDB(tmp_path, readonly=readonly)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
@pytest.mark.parametrize("readonly", [False, True])
def test_path_that_no_system_takes(tmp_path, path, readonly):
    with pytest.raises(StoreError):
        PromptDB(f"{tmp_path}/{path}", readonly=readonly)


def test_no_store_to_read(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(NotAStoreError, match="there is no store at"):
            PromptDB(path, readonly=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"x", b"garbage" * 1000, bytes(4096), os.urandom(100_000)], ids=len)
@pytest.mark.parametrize("readonly", [False, True])
def test_data_file_is_garbage(store_path, content, readonly):
    store_path.mkdir()
    (store_path / "data.mdb").write_bytes(content)
    with pytest.raises(NotAStoreError):
        PromptDB(store_path, readonly=readonly)
    assert (store_path / "data.mdb").read_bytes() == content


def test_data_file_is_empty(store_path):
    """As another process leaves it for a moment while it creates the store."""
    store_path.mkdir()
    (store_path / "lock.mdb").touch()
    (store_path / "data.mdb").touch()
    with pytest.raises(StoreError):
        PromptDB(store_path, readonly=True)
    with PromptDB(store_path) as db:
        put(db, [1, 2])


def test_creation_that_was_killed_early(store_path):
    store_path.mkdir()
    (store_path / "lock.mdb").touch()
    with PromptDB(store_path) as db:
        put(db, [1, 2])


@pytest.mark.parametrize("names", [[b"users"], [b"meta"], [b"users", b"nodes", b"meta"]])
def test_lmdb_file_of_something_else(store_path, names):
    env = lmdb.open(str(store_path), max_dbs=8)
    for name in names:
        with env.begin(write=True, db=env.open_db(name)) as transaction:
            transaction.put(b"k", b"v")
    env.close()
    before = (store_path / "data.mdb").read_bytes()
    for readonly in (False, True):
        if names == [b"meta"] and not readonly:
            continue
        with pytest.raises(NotAStoreError):
            PromptDB(store_path, readonly=readonly)
    assert (store_path / "data.mdb").read_bytes() == before


def test_lmdb_file_without_tables(store_path):
    env = lmdb.open(str(store_path))
    with env.begin(write=True) as transaction:
        transaction.put(b"nodes", b"a plain value")
    env.close()
    for readonly in (False, True):
        with pytest.raises(NotAStoreError):
            PromptDB(store_path, readonly=readonly)


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format_version": FORMAT_VERSION + 1}, FormatVersionError),
        ({"format_version": 10**6, "chunk_tokens": "in another way"}, FormatVersionError),
        ({"format_version": 0}, CorruptDataError),
        ({"format_version": "1"}, CorruptDataError),
        ({"format_version": None}, CorruptDataError),
        ({"chunk_tokens": 0}, CorruptDataError),
        ({"chunk_tokens": None}, CorruptDataError),
        ({"created_unix_s": "now"}, CorruptDataError),
    ],
    ids=str,
)
def test_settings_that_cannot_be_read(store_path, change, error, readonly):
    with PromptDB(store_path) as db:
        put(db, [1])
    with raw(store_path) as table:
        meta, transaction = table(META)
        fields = unpack_record(STORE_KEY, transaction.get(STORE_KEY, db=meta))
        transaction.put(STORE_KEY, pack_record(STORE_KEY, {**fields, **change}), db=meta)
    with pytest.raises(error) as caught:
        PromptDB(store_path, readonly=readonly)
    assert caught.value.hint


def test_newer_format_says_what_to_do(store_path):
    with PromptDB(store_path):
        pass
    with raw(store_path) as table:
        meta, transaction = table(META)
        transaction.put(STORE_KEY, pack_record(STORE_KEY, {"format_version": 99}), db=meta)
    with pytest.raises(FormatVersionError, match=rf"version 99.*reads up to {FORMAT_VERSION}.*upgrade promptdb"):
        PromptDB(store_path)


# Reading only


def test_readonly_handle(store_path):
    with PromptDB(store_path) as db:
        put(db, range(10))
        node, _ = next(db.nodes())
    with PromptDB(store_path, readonly=True) as db:
        assert db.readonly
        assert lookup(db, range(10)).num_tokens == 10
        assert read_tokens(db, range(10)) == pack_tokens(range(10))
        assert db.verify() == []
        for write in (
            lambda: put(db, [5]),
            lambda: db.remove(node),
            lambda: db.registry.add_model("aa" * 32, {}),
        ):
            with pytest.raises(ReadOnlyStoreError, match="reading only"):
                write()
        with pytest.raises(StoreError, match="already open for reading only"):
            PromptDB(store_path)
    with PromptDB(store_path) as writer, PromptDB(store_path, readonly=True) as reader:
        put(writer, [7, 8])
        assert lookup(reader, [7, 8]).num_tokens == 2
        with pytest.raises(ReadOnlyStoreError):
            put(reader, [5])


@contextlib.contextmanager
def mounted(*arguments):
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs the right to mount")
    if subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(arguments[-1])], check=True)


def test_readonly_filesystem(tmp_path):
    """A store on a disk that cannot be written is read without its lock file, and refuses to be written."""
    with PromptDB(tmp_path / "real") as db:
        put(db, range(10))
    (tmp_path / "view").mkdir()
    with mounted("--bind", tmp_path / "real", tmp_path / "view"):
        subprocess.run(["mount", "-o", "remount,ro,bind", tmp_path / "view"], check=True)
        with pytest.raises(ReadOnlyStoreError, match="cannot be written"):
            PromptDB(tmp_path / "view")
        with PromptDB(tmp_path / "view", readonly=True) as db:
            assert read_tokens(db, range(10)) == pack_tokens(range(10))
        with pytest.raises(StoreError):
            PromptDB(tmp_path / "view" / "new")


# A full disk


def fill(db):
    """Put prompts until the disk is full; return how many fitted."""
    for first in range(10_000):
        try:
            put(db, [first, *range(2000)])
        except StoreFullError:
            return first
    raise AssertionError("the disk did not fill")


def test_full_disk(tmp_path):
    """The put that does not fit fails whole; what was stored stays readable, and writable once there is room."""
    with mounted("-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path):
        ballast = tmp_path / "ballast"
        ballast.write_bytes(bytes(2 << 20))
        with PromptDB(tmp_path / "store", map_bytes=1 << 26, policy="ttl") as db:  # which evicts nothing
            stored = fill(db)
            assert 10 < stored < 10_000
            assert db.verify() == []
            assert db.stat()["num_tokens"] == stored * 2001
            for first in range(stored):
                assert read_tokens(db, [first, *range(2000)]) == pack_tokens([first, *range(2000)])
            assert lookup(db, [stored, *range(2000)]).num_tokens == 0
            with pytest.raises(StoreFullError, match=r"no space left.*still readable") as caught:
                put(db, [stored, *range(2000)])
            assert isinstance(caught.value, OSError)
            ballast.unlink()
            put(db, [stored, *range(2000)])
            assert lookup(db, [stored, *range(2000)]).num_tokens == 2001
            assert db.verify() == []
        with PromptDB(tmp_path / "store") as db:
            assert db.stat()["num_tokens"] == (stored + 1) * 2001


def test_full_disk_at_creation(tmp_path):
    with mounted("-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path):
        (tmp_path / "ballast").write_bytes(bytes(56 << 10))
        with pytest.raises(StoreFullError):
            PromptDB(tmp_path / "store")


def test_full_store_is_freed_by_removing(tmp_path):
    with (
        mounted("-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path),
        PromptDB(tmp_path / "store", policy="ttl") as db,
    ):
        stored = fill(db)
        assert stored > 20
        for victim in range(stored // 2):
            db.remove(lookup(db, [victim, *range(2000)]).steps[0].node)
        for victim in range(stored // 4):
            put(db, [victim, *range(2000)])
        assert db.verify() == []


# Damage on disk


def damage(path, table, change, key=None):
    """Change one value; return its key. Without ``key``: the first of the table."""
    with raw(path) as open_table:
        handle, transaction = open_table(table)
        if key is None:
            cursor = transaction.cursor(handle)
            assert cursor.first()
            key = bytes(cursor.key())
        value = change(bytearray(transaction.get(key, db=handle)))
        if value is None:
            transaction.delete(key, db=handle)
        else:
            transaction.put(key, bytes(value), db=handle)
    return key


def flip_last(value):
    value[-1] ^= 0x10
    return value


def flip_first(value):
    value[0] ^= 0x10
    return value


def shorten(value):
    return value[: len(value) // 2]


def empty(value):
    return b""


def gone(value):
    return None


@pytest.fixture
def sound(store_path):
    with PromptDB(store_path, chunk_tokens=8) as db:
        put(db, range(8), logits=[8])
        db.registry.add_model("cc" * 32, {"name": "model"})
    return store_path


@pytest.mark.parametrize("change", [flip_first, flip_last, shorten, empty, gone])
@pytest.mark.parametrize("table", [NODES, BLOBS, LOGITS, CHILDREN, ROOTS, MODELS])
@pytest.mark.parametrize("verify_reads", ["once", "always"])
def test_damage_is_noticed_on_reading_and_named_by_verify(sound, table, change, verify_reads):
    key = damage(sound, table, change)
    with PromptDB(sound, verify_reads=verify_reads) as db:
        problems = db.verify()
        named = {(problem.table, problem.key) for problem in problems}
        # What is gone cannot be named: what belonged to it is.
        missed = {NODES: {BLOBS, CHILDREN, LOGITS, ROOTS, LIFE, META}, LOGITS: {ROOTS, LIFE, META}, MODELS: set()}
        if change is gone and table in missed:
            assert {name for name, _ in named} == missed[table]
        else:
            assert (table, key.hex()) in named
        refused = False
        for read in (
            lambda: read_tokens(db, range(8)),
            lambda: read_logits(db),
            db.nodes,
            db.roots,
            db.registry.models,
        ):
            try:
                result = read()
                if isinstance(result, bytes):  # a shorter answer is right, another one is not
                    assert pack_tokens(range(8)).startswith(result) or result == bytes(16)
                elif result is not None:
                    list(result)
            except CorruptDataError as error:
                refused = bool(error.message)
            except (AttributeError, TypeError):
                assert change is gone  # a record or blob that is not there reads as None
        assert refused or change is gone


@pytest.mark.parametrize("change", [flip_first, flip_last, shorten, empty, gone])
@pytest.mark.parametrize("table", [NODES, BLOBS, LOGITS, CHILDREN, ROOTS, MODELS])
def test_damage_is_repaired(sound, table, change):
    with PromptDB(sound) as db:
        put(db, range(1000, 1020), logits=[20])
    damage(sound, table, change)
    with PromptDB(sound) as db:
        problems = db.verify(fix=True)
        assert problems or table == MODELS
        assert db.verify() == []
        for tokens in (range(8), range(1000, 1020)):
            found = lookup(db, tokens).num_tokens
            assert read_tokens(db, tokens) == pack_tokens(tokens[:found])
            put(db, tokens, logits=[len(tokens)])
            assert lookup(db, tokens).is_complete
            assert read_tokens(db, tokens) == pack_tokens(tokens)
        assert db.stat()["num_nodes"] == 4
        assert db.verify() == []


@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize("at", [0, 1])
def test_a_span_with_a_damaged_record_is_removed(store_path, only, at):
    """The record says what belongs to a span; without it, a walk over the store does."""
    with PromptDB(store_path, chunk_tokens=8) as db:
        put(db, range(24), logits=[8, 16, 24])
        nodes = [step.node for step in lookup(db, range(24)).steps]
    damage(store_path, NODES, flip_last, nodes[at])
    with PromptDB(store_path) as db:
        assert db.remove(nodes[at], only=only) == 1
        assert lookup(db, range(24)).num_tokens == 8 * at
        assert db.verify() == []
        if at == 0:  # and what stands on it can be removed, whose prefix cannot be known any more
            assert db.remove(nodes[1], only=only) == 1
        put(db, range(24))
        assert read_tokens(db, range(24)) == pack_tokens(range(24))
        assert db.verify() == []


def test_a_span_that_stands_on_a_damaged_record_is_removed(store_path):
    with PromptDB(store_path, chunk_tokens=8) as db:
        put(db, range(24))
        nodes = [step.node for step in lookup(db, range(24)).steps]
    damage(store_path, NODES, flip_last, nodes[0])
    with PromptDB(store_path) as db:
        assert db.remove(nodes[2]) == 1
        assert db.verify() == []


def read_logits(db):
    from promptdb.keys import prefix_digests

    with db.read() as snapshot:
        (digest,) = prefix_digests(ROOT.digest, pack_tokens(range(8)), [8])
        found = snapshot.logits(digest)
        return None if found is None else bytes(found.data)


def test_blob_damaged_after_it_was_checked(sound):
    """``once`` believes what it has checked, ``always`` does not, ``never`` checks the header only."""
    flipped = {}
    for mode in ("once", "always", "never"):
        shutil.copytree(sound, flipped.setdefault(mode, sound.parent / mode))
        with PromptDB(flipped[mode], verify_reads=mode) as db:
            assert read_tokens(db, range(8)) == pack_tokens(range(8))
            db._index.transact(lambda writer: [writer.put(BLOBS, *item) for item in damaged(writer)])
            if mode == "always":
                with pytest.raises(CorruptDataError, match="checksum of blob tokens"):
                    read_tokens(db, range(8))
            else:
                assert read_tokens(db, range(8)) != pack_tokens(range(8))
            assert [problem.table for problem in db.verify()] == [BLOBS]


def damaged(reader):
    return [(key, bytes(flip_last(bytearray(value)))) for key, value in reader.scan(BLOBS)]


def test_blob_replaced_by_another_process_is_checked_again(sound):
    """``once`` is once per content: a blob that was removed and stored again elsewhere is not believed unseen."""
    with PromptDB(sound) as db:
        assert read_tokens(db, range(8)) == pack_tokens(range(8))
        node, record = next(db.nodes())
        with db.read() as snapshot:
            content = bytes(snapshot.reader.get(BLOBS, node + b"tokens"))
        # another process: it knows nothing of this handle
        other = SpanPayload(0, 8, record.layout, {"tokens": content[:-1] + b"\x07"}, 0.0, {})
        script = f"""
from promptdb.commits import SpanPayload
from promptdb.db import PromptDB
from promptdb.format import BLOBS
from promptdb.keys import Root
db = PromptDB({str(sound)!r})
node = bytes.fromhex({node.hex()!r})
db.remove(node)
span = SpanPayload(0, 8, (), {{"tokens": {other.blobs["tokens"]!r}}}, 0.0, {{}})
db.put(Root({ROOT.weights_id!r}, {ROOT.tokenizer_id!r}), {pack_tokens(range(8))!r}, 0, lambda start: [span])
damaged = {content[:-1]!r} + b"\\x09"
db._index.transact(lambda writer: writer.put(BLOBS, node + b"tokens", damaged))
"""
        subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
        with pytest.raises(CorruptDataError, match="checksum"):
            read_tokens(db, range(8))


def test_record_under_another_node_is_refused(sound):
    with raw(sound) as table:
        handle, transaction = table(NODES)
        cursor = transaction.cursor(handle)
        cursor.first()
        key, value = bytes(cursor.key()), bytes(cursor.value())
        moved = key[:8] + bytes(24)  # the checksum's seed agrees, the node does not
        transaction.put(moved, value, db=handle)
    with PromptDB(sound) as db, db.read() as snapshot:
        with pytest.raises(CorruptDataError, match="belongs to another span"):
            snapshot.record(moved)
        assert snapshot.record(bytes(32)) is None


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_file_that_was_cut_off(tmp_path, kept):
    """Touching a mapped page beyond the end of a file kills the process; a store that was copied badly must not."""
    with PromptDB(tmp_path / "store", chunk_tokens=8) as db:
        for first in range(200):
            put(db, [first, *range(100)])
    data = tmp_path / "store" / "data.mdb"
    os.truncate(data, int(data.stat().st_size * kept))
    script = f"""
from promptdb import PromptDB
from promptdb.errors import CorruptDataError, StoreError
try:
    with PromptDB({str(tmp_path / "store")!r}) as db:
        problems = db.verify()
        print("problems", len(problems))
except (CorruptDataError, StoreError) as error:
    print("refused", type(error).__name__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("refused", "problems"))
    assert done.stdout != "problems 0\n"


# Lookups


@pytest.mark.parametrize(
    ("tokens", "error"),
    [([-1], TokenRangeError), ([2**32], TokenRangeError), (["a"], InputTypeError), (5, InputTypeError),
     ("ab", InputTypeError), ([1.5], InputTypeError), (b"abc", PromptError)],
)  # fmt: skip
def test_tokens_that_cannot_be(db, tokens, error):
    with pytest.raises(error):
        lookup(db, tokens)


@pytest.mark.parametrize("name", ["model", "tokenizer", "namespace", "intervention"])
@pytest.mark.parametrize("value", [None, 3, b"aa", ["aa"]], ids=str)
def test_identities_of_another_type(db, name, value):
    with pytest.raises(InputTypeError):
        db.lookup([1], **{"model": "aa", "tokenizer": "bb", name: value})


def test_lookup_says_whether_logits_are_there(db):
    put(db, range(40), logits=[20, 40])
    assert lookup(db, range(40)).is_complete
    assert not lookup(db, range(41)).is_complete
    assert lookup(db, range(20)).is_complete
    assert not lookup(db, range(19)).has_logits
    assert not lookup(db, []).is_complete


@pytest.mark.parametrize("on_disk", [True, False])
def test_nodes_may_be_removed_while_they_are_listed(on_disk):
    """A walk over all nodes holds nothing between them: writing meanwhile is allowed."""
    directory = scratch_directory()
    with PromptDB(directory / "store", chunk_tokens=1) if on_disk else PromptDB.in_memory(chunk_tokens=1) as db:
        put(db, range(600))
        assert [node for node, _ in db.nodes()] == sorted({node for node, _ in db.nodes()})
        seen = 0
        for node, record in db.nodes():
            assert record.num_tokens == 1
            db.remove(node, only=True)
            seen += 1
        assert seen == 600
        assert db.stat()["num_nodes"] == 0
        assert db.verify() == []
    shutil.rmtree(directory)


def test_find_node(db):
    put(db, range(60))
    nodes = [node for node, _ in db.nodes()]
    for node in nodes:
        assert db.find_node(node.hex()) == node
        assert db.find_node(node.hex().upper()[:17]) == node
    for wrong in ("", "zz", "a b", "é", "00" * 32, nodes[0].hex() + "0", nodes[0].hex() + "00"):
        with pytest.raises(NodeNotFoundError) as caught:
            db.find_node(wrong)
        assert isinstance(caught.value, KeyError)


def test_find_node_by_odd_digits():
    with PromptDB.in_memory() as db:
        for first in range(100):
            put(db, [first])
        nodes = sorted(node.hex() for node, _ in db.nodes())
        for length in (1, 3, 5):
            for prefix in {node[:length] for node in nodes}:
                matching = [node for node in nodes if node.startswith(prefix)]
                if len(matching) == 1:
                    assert db.find_node(prefix).hex() == matching[0]
                else:
                    with pytest.raises(NodeNotFoundError, match="several"):
                        db.find_node(prefix)


# Writing


def test_totals_are_exact(db):
    other = Root("aa" * 32, "bb" * 32, "tenant")
    report = put(db, range(40), logits=[40, 7])
    put(db, [*range(10), 99], logits=[11])
    put(db, range(5), root=other)
    assert report.num_spans == 3
    assert report.num_tokens == 40
    totals = dict(db.roots())
    assert totals[ROOT]["num_tokens"] == 41
    assert totals[other] == {"num_nodes": 1, "num_tokens": 5, "blob_bytes": totals[other]["blob_bytes"]}
    with db.read() as snapshot:
        held = sum(len(value) for table in (BLOBS, LOGITS) for _, value in snapshot.reader.scan(table))
    assert db.stat()["blob_bytes"] == held
    assert db.stat()["num_logits"] == 3
    assert put(db, range(40), logits=[40, 7]).num_bytes == 0
    assert dict(db.roots()) == totals
    assert db.verify() == []
    db.remove(lookup(db, range(40)).steps[0].node)
    assert ROOT not in dict(db.roots())
    assert dict(db.roots())[other] == totals[other]
    assert db.stat()["num_logits"] == 0


def test_spans_without_blobs_are_counted():
    with PromptDB.in_memory() as db:
        db.put(ROOT, pack_tokens(range(3)), 0, lambda start: [SpanPayload(0, 3, (), {}, 0.0, {})])
        assert db.stat()["num_nodes"] == 1
        assert db.verify() == []


def test_logits_of_what_is_stored_already(db):
    put(db, range(20))
    assert put(db, range(20), logits=[20]).num_spans == 0
    assert lookup(db, range(20)).is_complete
    assert read_logits_at(db, 20) == bytes(16)


def read_logits_at(db, position):
    from promptdb.keys import prefix_digests

    with db.read() as snapshot:
        (digest,) = prefix_digests(ROOT.digest, pack_tokens(range(position)), [position])
        return bytes(snapshot.logits(digest).data)


@pytest.mark.parametrize("position", [0, -1, 4])
def test_logits_at_no_position(db, position):
    with pytest.raises(PromptError, match="logits after"):
        put(db, range(3), logits=[position])
    assert db.stat()["num_nodes"] == 0


def spans(*bounds):
    return lambda start: [SpanPayload(begin, end, (), {}, 0.0, {}) for begin, end in bounds]


@pytest.mark.parametrize(
    "bounds", [[(0, 9)], [(1, 4)], [(0, 2), (3, 4)], [(0, 2), (1, 4)], [(0, 0)], [(2, 1)], [(-1, 4)]], ids=str
)
def test_spans_that_do_not_tile(db, bounds):
    with pytest.raises(PromptError, match="do not tile"):
        db.put(ROOT, pack_tokens(range(4)), 0, spans(*bounds))
    assert db.stat()["num_nodes"] == 0


def test_odd_bytes_are_no_prompt(db):
    with pytest.raises(PromptError, match="no packed tokens"):
        db.put(ROOT, b"abc", 0, spans())


def test_nothing_to_put(db):
    assert db.put(ROOT, b"", 0, spans()).num_spans == 0
    assert db.stat()["num_roots"] == 0


def test_removing_what_is_not_there(db):
    with pytest.raises(NodeNotFoundError):
        db.remove(bytes(32))


def test_a_put_that_fails_leaves_nothing(db):
    put(db, range(10))
    before = db.stat()
    payload = SpanPayload(10, 20, (), {"tokens": bytes(1 << 16), "bad": "text"}, 0.0, {})
    with pytest.raises(TypeError):
        db.put(ROOT, pack_tokens(range(20)), 10, lambda start: [payload])
    assert {**db.stat(), "file_bytes": 0} == {**before, "file_bytes": 0}
    assert lookup(db, range(20)).num_tokens == 10


def test_writing_inside_a_read_is_refused(db):
    with db.read(), pytest.raises(StoreError, match="cannot write while it reads"):
        put(db, [1])


def test_closed_store(store_path):
    db = PromptDB(store_path)
    put(db, [1])
    db.close()
    db.close()
    for use in (lambda: lookup(db, [1]), lambda: put(db, [2]), db.stat, db.verify, lambda: list(db.nodes()), db.roots):
        with pytest.raises(StoreError, match="closed"):
            use()
    memory = PromptDB.in_memory()
    memory.close()
    with pytest.raises(StoreError, match="closed"):
        lookup(memory, [1])


def test_handles_of_one_process_share_the_store(store_path):
    first, second = PromptDB(store_path), PromptDB(str(store_path))
    put(first, [1, 2])
    assert lookup(second, [1, 2]).num_tokens == 2
    first.close()
    put(second, [3])
    link = store_path.parent / "link"
    link.symlink_to(store_path)
    with PromptDB(link) as third:
        assert lookup(third, [3]).num_tokens == 1
    second.close()


def test_a_store_that_was_deleted_and_made_again(store_path):
    """A handle that was left open on the deleted one must not be taken for the new one."""
    old = PromptDB(store_path)
    put(old, [1])
    shutil.rmtree(store_path)
    with PromptDB(store_path) as new:
        assert lookup(new, [1]).num_tokens == 0
        put(new, [2])
        assert (store_path / "data.mdb").stat().st_size > 0
    with PromptDB(store_path) as again:
        assert lookup(again, [2]).num_tokens == 1
    old.close()


def test_the_map_grows_for_a_blob_larger_than_itself(store_path):
    blob = bytes(8 << 20)
    with PromptDB(store_path, map_bytes=1) as db:
        db.put(ROOT, pack_tokens([1]), 0, lambda start: [SpanPayload(0, 1, (), {"x": blob}, 0.0, {})])
        assert db.stat()["map_bytes"] > 8 << 20
        assert db.stat()["blob_bytes"] == len(blob)
    with PromptDB(store_path, map_bytes=1) as db:
        assert db.stat()["blob_bytes"] == len(blob)


def test_registry(store_path):
    with PromptDB(store_path) as db:
        registry = db.registry
        assert registry.model("aa" * 32) is None
        assert registry.checkpoint(b"file") is None
        registry.update_rates("aa" * 32, load_bytes_per_s=1.0)  # of a model that nobody knows: nothing
        registry.add_model("aa" * 32, {"name": "first"})
        registry.add_model("aa" * 32, {"name": "second"})
        registry.update_rates("aa" * 32, load_bytes_per_s=100.0)
        registry.update_rates("aa" * 32, load_bytes_per_s=200.0, compute_tokens_per_s=5.0)
        registry.add_tokenizer("bb" * 32, {"json": "{}"})
        registry.add_tokenizer("bb" * 32, {"json": "[]"})
        registry.add_checkpoint(b"file", {"weights_id": "1"})
        registry.add_checkpoint(b"file", {"weights_id": "2"})
    with PromptDB(store_path, readonly=True) as db:
        model = db.registry.models()["aa" * 32]
        assert model["name"] == "first"
        assert model["load_bytes_per_s"] == pytest.approx(130.0)
        assert model["compute_tokens_per_s"] == 5.0
        assert db.registry.tokenizers() == {"bb" * 32: {"json": "{}"}}
        assert db.registry.tokenizer("bb" * 32) == {"json": "{}"}
        assert db.registry.checkpoint(b"file") == {"weights_id": "2"}
        assert db.verify() == []


def test_tables_have_the_names_of_the_format(store_path):
    with PromptDB(store_path):
        pass
    env = lmdb.open(str(store_path), max_dbs=32, readonly=True)
    with env.begin() as transaction:
        assert {key.decode() for key, _ in transaction.cursor()} == set(TABLES)
    env.close()
    assert Path(store_path, "data.mdb").exists()
