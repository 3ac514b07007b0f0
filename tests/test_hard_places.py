"""Limits of the system that are met in the middle of work: a clear error, the store intact, reading goes on."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import endurance
import pytest

from promptdb import PromptDB

TESTS = Path(__file__).parent
TIMEOUT_S = 60

PRELUDE = f"""
import os, resource, signal, sys
sys.path.insert(0, {str(TESTS)!r})
from endurance import CHUNK, check_content, put
from promptdb import PromptDB
from promptdb.errors import ReadOnlyStoreError, StoreError, StoreFullError
path = sys.argv[1]

def fill(db, most=400):
    for n in range(most):
        try:
            put(db, [n, *range(60)], largest=60_000)
        except StoreError as error:
            return n, error
    return most, None
"""


def in_process(script, path, **options):
    """Run a script in a process of its own; return its lines."""
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check_all(path, count):
    with PromptDB(path) as db:
        assert db.verify() == []
        for n in range(count):
            assert endurance.check_content(db, [n, *range(60)], largest=60_000) == 61


def test_a_limit_on_the_size_of_files(store_path):
    """As `ulimit -f` sets it. The policy evicts nothing, so that all that was put must still be there."""
    count, *said = in_process(
        """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with PromptDB(path, chunk_tokens=CHUNK, policy="ttl") as db:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
            count, error = fill(db)
            assert isinstance(error, StoreFullError), error
            assert error.hint
            for n in range(count):
                assert check_content(db, [n, *range(60)], largest=60_000) == 61
            assert db.verify() == []
            print(count)
            print(error.message)
        """,
        store_path,
    )
    assert int(count) > 10
    assert "no space left" in said[0]
    check_all(store_path, int(count))


def test_a_limit_on_the_address_space(store_path):
    """The map cannot grow: what was stored can be read, and is whole."""
    count, said = in_process(
        """
        with PromptDB(path, chunk_tokens=CHUNK, map_bytes=1 << 20, policy="ttl") as db:
            put(db, [0, *range(60)], largest=60_000)
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            before = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 19), before[1]))
            count, error = fill(db)
            resource.setrlimit(resource.RLIMIT_AS, before)
            assert isinstance(error, StoreFullError), error
            assert check_content(db, [count - 1, *range(60)], largest=60_000) == 61
            print(count)
            print(error.message)
        """,
        store_path,
    )
    assert "cannot grow" in said
    check_all(store_path, int(count))


# What is imported when it is used first is imported before: such a user may not be able to read it.
AS_NOBODY = """
        import tempfile
        with tempfile.TemporaryDirectory() as directory, PromptDB(directory + "/store") as db:
            put(db, range(5))
            db.verify()
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
"""


def given_away(path):
    """Let a user without rights own a directory and all that is in it."""
    if os.geteuid() == 0:
        for each in (path, *path.iterdir()):
            os.chown(each, 65534, 65534)


@pytest.fixture
def reachable(tmp_path_factory):
    """A directory that other users can reach, unlike pytest's own."""
    import shutil
    import tempfile

    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def test_a_directory_that_cannot_be_written(reachable):
    path = reachable / "store"
    with PromptDB(path, chunk_tokens=endurance.CHUNK) as db:
        endurance.put(db, [0, *range(60)], largest=60_000)
    (path / "lock.mdb").unlink()
    given_away(path)
    path.chmod(0o500)
    (path / "data.mdb").chmod(0o400)
    lines = in_process(
        AS_NOBODY
        + """
        try:
            PromptDB(path)
        except ReadOnlyStoreError as error:
            print(error.message)
            print(error.hint)
        with PromptDB(path, readonly=True) as db:
            print(check_content(db, [0, *range(60)], largest=60_000))
        """,
        path,
    )
    path.chmod(0o700)
    assert "cannot be written" in lines[0]
    assert "read-only" in lines[1]
    assert lines[2] == "61"


def test_permissions_that_are_taken_away_in_the_middle(reachable):
    """What is open stays open; who comes later is told. Nothing is lost."""
    path = reachable / "store"
    with PromptDB(path, chunk_tokens=endurance.CHUNK, map_bytes=1):
        pass
    given_away(path)
    lines = in_process(
        AS_NOBODY
        + """
        with PromptDB(path, map_bytes=1) as db:
            put(db, [0, *range(60)], largest=60_000)
            os.chmod(path + "/data.mdb", 0)
            os.chmod(path, 0)
            count = 1
            try:
                for count in range(1, 200):  # the map and the file grow
                    put(db, [count, *range(60)], largest=60_000)
                count += 1
            except StoreError as error:
                print("said", error.message)
            for n in range(count):
                assert check_content(db, [n, *range(60)], largest=60_000) == 61
            try:
                PromptDB(path + "/../store/.")
                print("opened")
            except StoreError as error:
                print("refused")
        print(count)
        """,
        path,
    )
    path.chmod(0o700)
    (path / "data.mdb").chmod(0o600)
    assert lines[-2] == "refused"
    check_all(path, int(lines[-1]))


def test_a_writer_that_is_stopped_does_not_stop_readers(store_path):
    """SIGSTOP in the middle of a transaction: others read on, and writers wait until it goes on."""
    with PromptDB(store_path, chunk_tokens=endurance.CHUNK) as db:
        endurance.put(db, [0, *range(60)], largest=60_000)
        script = """
        with PromptDB(path) as db:
            def work(writer):
                print("inside", flush=True)
                sys.stdin.readline()
            db._index.transact(work)
        """
        command = [sys.executable, "-c", PRELUDE + textwrap.dedent(script), str(store_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "inside\n"
        process.send_signal(signal.SIGSTOP)
        for _ in range(50):
            assert endurance.check_content(db, [0, *range(60)], largest=60_000) == 61
        with PromptDB(store_path, readonly=True) as other:
            assert other.verify() == []
        process.send_signal(signal.SIGCONT)
        process.communicate("\n", timeout=TIMEOUT_S)
        endurance.put(db, [1, *range(60)], largest=60_000)
    check_all(store_path, 2)
