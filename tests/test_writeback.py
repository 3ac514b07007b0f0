"""Writing begins while a large commit is copied; whatever happens to that hint, the commit is what it was."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from promptdb import PromptDB, writeback
from promptdb.errors import StoreError
from promptdb.format import BLOBS
from promptdb.lmdb_errors import DATA_FILE

LARGE, SMALL = bytes(16 << 20), bytes(1 << 20)
linux = pytest.mark.skipif(sys.platform != "linux", reason="sync_file_range is Linux's")


@pytest.fixture
def hints(monkeypatch):
    """The files that were to be written early, as they were when they were."""
    found = []

    def start_writing(descriptor, first, count, how):
        found.append((os.fstat(descriptor).st_ino, first, count, how))
        return 0

    monkeypatch.setattr(writeback, "_sync_file_range", lambda: start_writing)
    return found


def put(db, value, key=b"k" * 33):
    db._index.transact(lambda writer: writer.put(BLOBS, key, value))
    with db._index.read() as reader:
        assert reader.get(BLOBS, key) == value


def num_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


@linux
def test_of_large_commits_only(tmp_path, hints):
    with PromptDB(tmp_path / "store") as db:
        put(db, SMALL)
        assert hints == []
        before = num_descriptors()
        put(db, LARGE)
        assert set(hints) == {((tmp_path / "store" / DATA_FILE).stat().st_ino, 0, 0, 2)}
        assert num_descriptors() == before
        assert not [each for each in threading.enumerate() if each.name == "promptdb-writeback"]


def test_nothing_is_hurried_that_nobody_waits_for(tmp_path, hints):
    with PromptDB(tmp_path / "store", durability="process") as db:
        put(db, LARGE)
    assert hints == []


@linux
def test_the_system_takes_the_hint(tmp_path):
    """As it is called, on a real file: what was written goes to the disk with nobody asking for it to be there."""
    start_writing = writeback._sync_file_range()
    with (tmp_path / "file").open("wb") as file:
        file.write(LARGE)
        file.flush()
        assert start_writing(file.fileno(), 0, 0, 2) == 0
        assert start_writing(-1, 0, 0, 2) == -1


@pytest.mark.parametrize("failing", ["open", "start", "hint", "none"])
def test_without_it_a_commit_is_the_same(tmp_path, hints, monkeypatch, failing):
    def fail(*arguments, **options):
        raise {"open": OSError(24, "Too many open files"), "start": RuntimeError("can't start new thread")}[failing]

    with PromptDB(tmp_path / "store") as db:
        with monkeypatch.context() as broken:
            if failing == "open":
                broken.setattr(writeback.os, "open", fail)
            elif failing == "start":
                broken.setattr(threading.Thread, "start", fail)
            else:
                broken.setattr(writeback, "_sync_file_range", lambda: None if failing == "none" else lambda *_: -1)
            put(db, LARGE)
        put(db, LARGE[:-1])
    with PromptDB(tmp_path / "store", readonly=True) as db, db._index.read() as reader:
        assert reader.get(BLOBS, b"k" * 33) == LARGE[:-1]


@linux
def test_a_commit_that_fails_ends_it(tmp_path, hints):
    path = tmp_path / "file"
    path.touch()
    before = num_descriptors()

    def commit():
        time.sleep(0.01)
        raise StoreError("no room")

    with pytest.raises(StoreError, match="no room"), writeback.early_writeback(path, len(LARGE)):
        commit()
    assert hints
    assert num_descriptors() == before
    assert not [each for each in threading.enumerate() if each.name == "promptdb-writeback"]
