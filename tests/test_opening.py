"""Opening a store: what is created, what is refused, and what is left as it is."""

import os
import stat
import subprocess
import time

import lmdb
import pytest
from db_tools import lookup, mounted, put, raw, read_tokens

from promptdb import PromptDB
from promptdb.errors import (
    CorruptDataError,
    FormatVersionError,
    InputTypeError,
    NotAStoreError,
    ReadOnlyStoreError,
    StoreError,
)
from promptdb.format import (
    FORMAT_VERSION,
    META,
    STORE_KEY,
    TABLES,
    pack_record,
    unpack_record,
)
from promptdb.keys import pack_tokens
from promptdb.opening import PATH_VARIABLE, default_path


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


def test_a_store_that_is_being_created_is_not_called_something_else(store_path):
    """Its tables are made one after the other, its settings last."""
    for name in ("", *TABLES):
        with lmdb.open(str(store_path), max_dbs=len(TABLES)) as env:
            if name:
                env.open_db(name.encode())
        with pytest.raises(NotAStoreError, match="being created at this moment"):
            PromptDB(store_path, readonly=True)
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
