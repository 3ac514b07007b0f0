"""Copies of stores: consistent while others write, private, complete or not at all; and stores of strangers."""

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import pytest
from archive_tools import check_content, lookup, put
from cli_tools import run, run_json

from promptdb import PromptDB
from promptdb.backup import PAGES, backup, check_store
from promptdb.errors import CorruptDataError, FormatVersionError, NotAStoreError, StoreError
from promptdb.format import BLOBS, META, STORE_KEY, pack_record, unpack_record
from promptdb.pages import check_pages

TIMEOUT_S = 120


def environment():
    """Return the environment of a child that imports what the tests share."""
    here = Path(__file__).parent
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(here), str(here.parent)))}


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True, env=environment()
    )


PROMPTS = [(number, *range(20)) for number in range(30)]


@pytest.fixture
def filled(tmp_path):
    with PromptDB(tmp_path / "filled", chunk_tokens=8) as db:
        for tokens in PROMPTS:
            put(db, tokens, logits=[len(tokens)])
        yield db


def check_same(path):
    with PromptDB(path) as db:
        assert db.verify() == []
        assert [check_content(db, tokens) for tokens in PROMPTS] == [len(tokens) for tokens in PROMPTS]


def modes(path):
    return {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in [path, *path.iterdir()]}


# Private


def test_a_store_and_its_copy_are_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        with PromptDB(tmp_path / "store") as db:
            put(db, range(20))
            backup(db, tmp_path / "copy")
            backup(db, tmp_path / "other", compact=True, verify=False)
        with PromptDB(tmp_path / "copy") as db:
            put(db, range(30))
    finally:
        os.umask(before)
    assert modes(tmp_path / "store") == {"store": 0o700, "data.mdb": 0o600, "lock.mdb": 0o600}
    assert modes(tmp_path / "copy") == {"copy": 0o700, "data.mdb": 0o600, "lock.mdb": 0o600}
    assert modes(tmp_path / "other") == {"other": 0o700, "data.mdb": 0o600}


# Copies


@pytest.mark.parametrize("compact", [False, True])
def test_a_copy_is_a_store(filled, tmp_path, compact):
    report = backup(filled, tmp_path / "copy", compact=compact)
    assert report.num_spans == filled.stat()["num_nodes"]
    assert report.num_bytes == (tmp_path / "copy" / "data.mdb").stat().st_size
    check_same(tmp_path / "copy")
    put(filled, [1, 2, 3])
    with PromptDB(tmp_path / "copy") as copy:
        assert lookup(copy, [1, 2, 3]).num_tokens == 1
        assert copy.chunk_tokens == 8


def test_a_compact_copy_leaves_out_what_was_removed(filled, tmp_path):
    for number in range(400):
        put(filled, [5000 + number, *range(20)])
    for node, record in list(filled.nodes()):
        if record.start == 0 and record.span[:4] not in {tokens[0].to_bytes(4, "little") for tokens in PROMPTS}:
            filled.remove(node)
    whole = backup(filled, tmp_path / "whole")
    compact = backup(filled, tmp_path / "compact", compact=True)
    assert compact.num_bytes < whole.num_bytes / 3
    check_same(tmp_path / "compact")


WRITER = """
import itertools, sys
from archive_tools import put
from promptdb import PromptDB
with PromptDB(sys.argv[1], map_bytes=1 << 20) as db:
    for number in itertools.count():
        put(db, (1000 + number, *range(40)), logits=[41])
        print(number, flush=True)
        if number % 3 == 0:
            nodes = list(itertools.islice(db.nodes(), 5))
            for node, record in nodes:
                if record.start == 0 and record.span[:4] == (1000 + number).to_bytes(4, "little"):
                    db.remove(node)
"""


@pytest.mark.parametrize("compact", [False, True])
def test_copies_while_another_process_writes(filled, tmp_path, compact):
    """Each copy is one moment of the store, and no older than what was acknowledged before it began."""
    writer = start(WRITER, tmp_path / "filled")
    try:
        for number in range(5):
            acknowledged = int(writer.stdout.readline())
            backup(filled, tmp_path / f"copy{number}", compact=compact)
            with PromptDB(tmp_path / f"copy{number}", readonly=True) as copy:
                assert copy.verify() == []
                found = [lookup(copy, (1000 + each, *range(40))).num_tokens for each in range(acknowledged + 1)]
                assert [tokens for each, tokens in enumerate(found) if each % 3] == [41] * (
                    acknowledged + 1 - (acknowledged + 3) // 3
                )
            check_same(tmp_path / f"copy{number}")
    finally:
        writer.kill()
        writer.communicate()


BACKUP = """
import sys
from promptdb import PromptDB
from promptdb.backup import backup
with PromptDB(sys.argv[1]) as db:
    print("ready", flush=True)
    backup(db, sys.argv[2], verify=False)
    print("done", flush=True)
"""


def test_backups_that_are_killed_are_no_stores(filled, tmp_path):
    for number in range(300):
        put(filled, [5000 + number, *range(20)])
    source, killed = random.Random(4), 0
    for _ in range(8):
        process = start(BACKUP, tmp_path / "filled", tmp_path / "copy")
        assert process.stdout.readline() == "ready\n"
        time.sleep(source.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        if process.communicate(timeout=TIMEOUT_S)[0] == "done\n" or (tmp_path / "copy" / "data.mdb").exists():
            check_same(tmp_path / "copy")
            shutil.rmtree(tmp_path / "copy")
        else:
            killed += 1
            with pytest.raises(NotAStoreError):
                PromptDB(tmp_path / "copy", readonly=True)
    assert killed
    (tmp_path / "copy").mkdir(exist_ok=True)
    (tmp_path / "copy" / "data.mdb.part").write_bytes(b"half")  # what one of them leaves
    backup(filled, tmp_path / "copy")
    check_same(tmp_path / "copy")


def test_places_that_cannot_hold_a_copy(filled, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_bytes(b"1")
    (tmp_path / "file").write_bytes(b"1")
    for place in ("full", "filled", "file", "a\0b"):
        with pytest.raises(StoreError) as raised:
            backup(filled, tmp_path / place)
        assert raised.value.hint
    with pytest.raises(StoreError):
        backup(filled, "/proc/copy")
    assert (tmp_path / "full" / "precious").read_bytes() == b"1"
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["precious"]
    with PromptDB.in_memory() as memory, pytest.raises(StoreError, match="in memory"):
        backup(memory, tmp_path / "copy")
    check_same(tmp_path / "filled")


def test_no_room_for_a_copy(filled, tmp_path):
    script = """
import resource, sys
from promptdb import PromptDB
from promptdb.backup import backup
from promptdb.errors import StoreFullError
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with PromptDB(sys.argv[1], readonly=True) as db:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    try:
        backup(db, sys.argv[2])
    except StoreFullError as error:
        print(error.message)
"""
    process = start(script, tmp_path / "filled", tmp_path / "copy")
    assert "no space left" in process.communicate(timeout=TIMEOUT_S)[0]
    assert list((tmp_path / "copy").iterdir()) == []
    check_same(tmp_path / "filled")


def test_a_copy_of_a_damaged_store_says_so(filled, tmp_path):
    def work(writer):
        key, value = next(iter(writer.scan(BLOBS)))
        writer.put(BLOBS, key, bytes(value)[:-1] + b"\xff")

    filled._index.transact(work)
    with pytest.raises(CorruptDataError, match="1 problems, the first"):
        backup(filled, tmp_path / "copy")
    assert backup(filled, tmp_path / "unread", verify=False).num_spans == -1


# Stores of strangers


@pytest.fixture
def suspect(filled, tmp_path):
    """A store that nobody has open."""
    filled.close()
    return tmp_path / "filled"


def test_a_sound_store_is_found_sound_without_its_lock_file(suspect):
    (suspect / "lock.mdb").unlink()
    (suspect / "lock.mdb").symlink_to("/dev/zero")  # LMDB must not look at it
    data = (suspect / "data.mdb").read_bytes()
    problems, num_spans = check_store(suspect)
    assert problems == []
    assert num_spans > len(PROMPTS)
    assert (suspect / "data.mdb").read_bytes() == data
    assert (suspect / "lock.mdb").is_symlink()


CHECK = """
import random, sys
from pathlib import Path
from archive_tools import check_content, lookup
from promptdb import PromptDB
from promptdb.backup import check_store
from promptdb.errors import StoreError
from test_backup import PROMPTS
suspect, seed = Path(sys.argv[1]), int(sys.argv[2])
source, sound = random.Random(seed), 0
data = (suspect / "data.mdb").read_bytes()
for _ in range(60):
    damaged = bytearray(data)
    for _ in range(source.choice([1, 1, 8])):
        at = source.randrange(len(data))
        at = source.choice([at, at % 8192, at & ~4095 | at % 32])  # meta pages and the heads of pages more often
        damaged[at] ^= 1 << source.randrange(8)
    if source.random() < 0.1:
        del damaged[source.randrange(len(data)):]
    (suspect / "data.mdb").write_bytes(damaged)
    try:
        problems, _ = check_store(suspect)
    except StoreError:
        continue
    if problems:
        continue
    sound += 1
    with PromptDB(suspect) as db:  # what passes may be used
        assert all(check_content(db, tokens) for tokens in PROMPTS)
print("sound", sound)
"""


@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_never_crash_the_check_nor_pass_as_something_else(suspect, seed):
    """In a process of its own: what the check lets through must not kill LMDB."""
    process = start(CHECK, suspect, seed)
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 0
    assert output.startswith("sound")


def test_what_the_pages_of_a_store_must_not_be(suspect, tmp_path):
    data = (suspect / "data.mdb").read_bytes()
    for content in (b"", b"\0" * 100_000, b"garbage" * 5000, data[:5000], data[: len(data) // 2], data[4096:]):
        (suspect / "data.mdb").write_bytes(content)
        problems, num_spans = check_store(suspect)
        assert problems
        assert problems[0].table == PAGES
        assert num_spans == 0
    (suspect / "data.mdb").unlink()
    with pytest.raises(NotAStoreError, match="no store at"):
        check_store(suspect)
    (suspect / "data.mdb").symlink_to("/dev/zero")
    with pytest.raises(NotAStoreError, match="link"):
        check_store(suspect)
    (suspect / "data.mdb").unlink()
    os.mkfifo(suspect / "data.mdb")
    with pytest.raises(NotAStoreError, match="pipe"):
        check_store(suspect)


def test_a_tree_inside_of_a_tree_inside_of_a_tree(suspect, monkeypatch):
    """A file made to exhaust the verifier itself is a problem, not a traceback."""
    import lmdb.verify

    def nested(*_, **__):
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(lmdb.verify, "verify", nested)
    assert "cannot be read" in check_pages(suspect)[0]


def test_records_are_checked_when_the_pages_hold(suspect):
    with PromptDB(suspect) as db:

        def work(writer):
            key, value = next(iter(writer.scan(BLOBS)))
            writer.put(BLOBS, key, bytes(value)[:-1] + b"\xff")

        db._index.transact(work)
    problems, num_spans = check_store(suspect)
    assert [problem.table for problem in problems] == [BLOBS]
    assert num_spans


def test_an_lmdb_file_of_something_else(tmp_path):
    (tmp_path / "other").mkdir()
    env = lmdb.open(str(tmp_path / "other"), max_dbs=2)
    with env.begin(write=True) as transaction:
        transaction.put(b"key", b"value")
    env.close()
    with pytest.raises(NotAStoreError) as raised:
        check_store(tmp_path / "other")
    assert str(tmp_path / "other") in raised.value.message


def test_a_store_of_a_newer_version(suspect):
    with PromptDB(suspect) as db:

        def work(writer):
            fields = unpack_record(STORE_KEY, writer.get(META, STORE_KEY))
            writer.put(META, STORE_KEY, pack_record(STORE_KEY, fields | {"format_version": 99}))

        db._index.transact(work)
    with pytest.raises(FormatVersionError, match="format version 99") as raised:
        check_store(suspect)
    assert str(suspect) in raised.value.message


# The command line


def test_commands(suspect, tmp_path):
    found = run_json("backup", "--db", suspect, tmp_path / "copy")
    assert found["is_verified"]
    assert found["num_bytes"] == (tmp_path / "copy" / "data.mdb").stat().st_size
    assert "everything holds" in run("backup", "--db", suspect, "--compact", tmp_path / "second").stdout
    assert "not verified" in run("backup", "--db", suspect, "--no-verify", tmp_path / "third").stdout
    check_same(tmp_path / "copy")
    assert run_json("check", tmp_path / "copy")["is_sound"]
    assert "everything holds" in run("check", tmp_path / "copy").stdout
    assert "not empty" in run("backup", "--db", suspect, tmp_path / "copy", code=2).stderr
    data = bytearray((tmp_path / "copy" / "data.mdb").read_bytes())
    data[-5000:] = bytes(5000)
    (tmp_path / "copy" / "data.mdb").write_bytes(data)
    found = run_json("check", tmp_path / "copy", code=1)
    assert not found["is_sound"]
    assert "Do not use this store" in run("check", tmp_path / "copy", code=1).stdout
    assert "no store at" in run("check", tmp_path, code=2).stderr
