"""Limits under several processes: one quota for all, kills in the middle of evictions, compacting while others come."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from promptdb import PromptDB
from promptdb.environment import COMPACT_FILE
from promptdb.errors import CorruptDataError, ReadOnlyStoreError, StoreError
from promptdb.format import BLOBS, LIFE, META, NODES, STORE_KEY, TABLES, pack_record, unpack_record
from promptdb.keys import Root, pack_tokens
from promptdb.verify import verify

ROOT = Root("aa" * 32, "bb" * 32)
TIMEOUT_S = 60

PRELUDE = """
import random, sys
from promptdb import PromptDB
from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import SpanPayload
from promptdb.keys import Root, pack_tokens
from promptdb.verify import verify

ROOT = Root("aa" * 32, "bb" * 32)
path, seed = sys.argv[1], int(sys.argv[2])
source = random.Random(seed)

def put(db, tokens, size=3000, **options):
    tokens = list(tokens)
    blob = bytes(build_blob([(TensorSpec("x", "U8", (size,)), bytes([tokens[0] % 251]) * size)]))
    def encode(start):
        ends = [*range((start // 16 + 1) * 16, len(tokens), 16), len(tokens)]
        return [SpanPayload(a, e, (), {"x": blob}, 1.0, {}) for a, e in zip([start, *ends[:-1]], ends)]
    return db.put(ROOT, pack_tokens(tokens), 0, encode, **options)

def found(db, tokens):
    return db.lookup(list(tokens), model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).num_tokens

def wait():
    print("ready", flush=True)
    sys.stdin.readline()
"""
exec(PRELUDE.replace("path, seed = sys.argv[1], int(sys.argv[2])", "seed = 0"), shared := {})
put, found = shared["put"], shared["found"]


def start(script, path, seed=0):
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), str(path), str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ready(process):
    assert process.stdout.readline() == "ready\n"


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def finish(process):
    output = process.communicate(timeout=TIMEOUT_S)[0]
    assert process.returncode == 0
    return output


def test_two_processes_share_a_quota(store_path):
    script = """
    with PromptDB(path) as db:
        wait()
        most = 0
        for n in range(250):
            put(db, [seed, n, *range(source.randint(1, 60))], source.choice([200, 3000, 40_000]))
            most = max(most, db.usage()["charged_bytes"])
            found(db, [source.randrange(2), source.randrange(n + 1), *range(60)])
    print(most)
    """
    with PromptDB(store_path, quota_bytes=2_000_000, chunk_tokens=16) as db:
        processes = [start(script, store_path, seed) for seed in range(2)]
        for process in processes:
            ready(process)
        for process in processes:
            go(process)
        for process in processes:
            assert 1_700_000 < int(finish(process)) <= 2_000_000
        assert db.verify() == []
        usage = db.usage()
        assert usage["charged_bytes"] <= 2_000_000
        assert usage["num_evicted"] > 300


def test_killed_writers_leave_the_quota_exact(store_path):
    """Whenever a process dies that stores and evicts, what is charged is what is stored, and what was acknowledged last
    is there, as nothing newer could have made it go."""
    script = """
    db = PromptDB(path)
    for n in range(10_000):
        tokens = [seed, n, *range(source.randint(1, 80))]
        put(db, tokens, source.choice([200, 3000, 40_000]), ttl_s=source.choice([None, 0.05]))
        if n % 7 == 0:
            put(db, tokens)
            db.pin(ROOT, tokens, expires_s=0.1, name=str(n))
        print(n, len(tokens), flush=True)
    """
    with PromptDB(store_path, quota_bytes=1_000_000, policy="fifo", chunk_tokens=16):
        pass
    source = random.Random(3)
    acknowledged = 0
    for seed in range(12):
        process = start(script, store_path, seed)
        first = [process.stdout.readline() for _ in range(source.randint(10, 60))]  # so many on any machine
        time.sleep(source.uniform(0.0, 0.02))
        process.send_signal(signal.SIGKILL)
        lines = [line for line in [*first, *process.stdout.read().splitlines(keepends=True)] if line.endswith("\n")]
        process.wait(TIMEOUT_S)
        acknowledged += len(lines)
        with PromptDB(store_path) as db:
            assert db.verify() == []
            assert db.usage()["charged_bytes"] <= 1_000_000
            n, _ = map(int, lines[-1].split())
            if n % 7 == 0:  # not one that may have expired
                assert found(db, [seed, n]) == 2
    assert acknowledged > 200
    with PromptDB(store_path) as db:
        assert db.usage()["num_evicted"] + db.usage()["num_expired"] > 100


def test_views_outlive_eviction(store_path):
    """What an open snapshot shows stays as it is while another process evicts it and uses its pages again."""
    script = """
    with PromptDB(path) as db:
        wait()
        for n in range(200):
            put(db, [1000, n], 40_000)
    """
    with PromptDB(store_path, quota_bytes=1_000_000, policy="fifo") as db:
        for first in range(20):
            put(db, [first], 40_000)
        process = start(script, store_path)
        ready(process)
        with db.read() as snapshot:
            views = [(bytes(key), value) for key, value in snapshot.reader.scan(BLOBS)]
            content = [bytes(value) for _, value in views]
            go(process)
            finish(process)
            assert [bytes(value) for _, value in views] == content
            assert all(found_in(snapshot, [first]) == 1 for first in range(20))
        assert not any(found(db, [first]) for first in range(20))
        assert db.verify() == []


def found_in(snapshot, tokens):
    return snapshot.match(ROOT, pack_tokens(tokens)).num_tokens


def test_what_goes_between_a_lookup_and_its_load_is_computed_again(store_path, tokenizer, monkeypatch):
    import torch
    from conftest import shared_model

    from promptdb import Engine

    prompt = tuple(range(3, 60))
    with PromptDB(store_path, chunk_tokens=16) as db, Engine(db, shared_model("llama"), tokenizer) as engine:
        wanted = engine.get(list(prompt)).token_logprobs
        engine.flush()
        engine._extender.held = None
        match_all = engine._extender.match_all
        lost = []

        def unlucky(root, prompts):
            matches = match_all(root, prompts)
            if len(lost) < 2 and matches[0].num_tokens:  # all goes just after it was found
                lost.append(matches[0].num_tokens)
                thread = threading.Thread(target=db.gc, args=(0,))
                thread.start()
                thread.join(TIMEOUT_S)
            return matches

        monkeypatch.setattr(engine._extender, "match_all", unlucky)
        found = engine.get([*prompt, 5])
        assert lost == [57]
        assert found.tokens_computed == 58
        torch.testing.assert_close(found.token_logprobs[:56], wanted, rtol=1e-5, atol=1e-5)
        engine.flush()
        assert db.verify() == []


# Compacting


def fill(db, count=300):
    for n in range(count):
        put(db, [n, *range(30)], 10_000)
    for n in range(0, count, 2):
        db.remove(db.lookup([n], model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).steps[0].node)


def content(db):
    with db.read() as snapshot:
        return {table: [(key, bytes(value)) for key, value in snapshot.reader.scan(table)] for table in TABLES}


def test_compacting_gives_space_back_and_changes_nothing(store_path):
    with PromptDB(store_path, chunk_tokens=16) as db, PromptDB(store_path) as other:
        fill(db)
        before = content(db)
        report = db.compact()
        assert report.after_bytes < 0.6 * report.before_bytes
        assert report.after_bytes == db.stat()["file_bytes"] == (store_path / "data.mdb").stat().st_size
        assert content(db) == content(other) == before
        put(other, [1000])
        assert found(db, [1000]) == 1
        db.compact()
        assert db.verify() == []
    assert {path.name for path in store_path.iterdir()} == {"data.mdb", "lock.mdb", "reserve"}
    with PromptDB(store_path) as db:
        assert db.verify() == []
        assert found(db, [1000]) == 1


def test_compacting_in_memory():
    with PromptDB.in_memory() as db:
        put(db, [1])
        db.compact()
        assert found(db, [1]) == 1


@pytest.mark.parametrize("readonly", [True, False])
def test_compacting_is_refused_while_others_have_the_store_open(store_path, readonly):
    script = f"""
    with PromptDB(path, readonly={readonly}) as db:
        wait()
        print(found(db, [1, *range(30)]))
    """
    with PromptDB(store_path, chunk_tokens=16) as db:
        fill(db, 20)
        process = start(script, store_path)
        ready(process)
        with pytest.raises(StoreError, match="open in other processes"):
            db.compact()
        put(db, [1000])
        assert found(db, [1000]) == 1
        assert not (store_path / COMPACT_FILE).exists()
        go(process)
        assert finish(process) == "31\n"
        db.compact()
        assert db.verify() == []


def test_compacting_is_refused_while_another_program_has_the_file_open(store_path):
    """One that knows nothing of our lock: LMDB's own shows it."""
    script = """
    import lmdb
    env = lmdb.open(path, max_dbs=32, readonly=True)
    wait()
    """
    with PromptDB(store_path) as db:
        fill(db, 20)
        process = start(script, store_path)
        ready(process)
        identity = (store_path / "data.mdb").stat().st_ino
        with pytest.raises(StoreError, match="open in other processes"):
            db.compact()
        assert (store_path / "data.mdb").stat().st_ino == identity
        assert found(db, [1]) == 1
        put(db, [1000])
        go(process)
        finish(process)
        db.compact()
        assert found(db, [1000]) == 1


def test_who_opens_the_store_while_it_is_compacted_waits(store_path, monkeypatch):
    script = """
    print("ready", flush=True)
    with PromptDB(path) as db:
        put(db, [5000])
        print(found(db, [1, *range(30)]))
    """
    with PromptDB(store_path, chunk_tokens=16) as db:
        fill(db, 20)
        started = []

        def check(reader):
            started.append(start(script, store_path))
            ready(started[0])
            time.sleep(0.5)
            assert started[0].poll() is None
            return verify(reader)

        monkeypatch.setattr("promptdb.lifecycle.verify", check)
        db.compact()
        assert finish(started[0]) == "31\n"
        assert found(db, [5000]) == 1  # it wrote to the new file


def test_compacting_waits_for_threads_that_read(store_path):
    with PromptDB(store_path, chunk_tokens=16) as db:
        fill(db, 20)
        inside, leave, seen = threading.Event(), threading.Event(), []

        def read():
            with db.read() as snapshot:
                views = [value for _, value in snapshot.reader.scan(BLOBS)]
                inside.set()
                leave.wait(TIMEOUT_S)
                seen.extend(bytes(view) for view in views)

        reader = threading.Thread(target=read)
        reader.start()
        assert inside.wait(TIMEOUT_S)
        compacting = threading.Thread(target=db.compact)
        compacting.start()
        compacting.join(0.1)
        assert compacting.is_alive()
        leave.set()
        for thread in (reader, compacting):
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
        assert len(seen) == 20
        with db.read(), pytest.raises(StoreError, match="cannot change while this thread reads"):
            db.compact()


def test_compacting_with_threads_that_read_and_write(store_path):
    errors = []
    with PromptDB(store_path, chunk_tokens=16, map_bytes=1) as db:
        fill(db, 20)
        stop = threading.Event()

        def work(seed):
            n = 0
            try:
                while not stop.is_set():
                    put(db, [seed, n, *range(20)])
                    assert found(db, [seed, n, *range(20)]) == 22
                    n += 1
            except Exception as error:  # noqa: BLE001
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in (1000, 1001)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            db.compact()
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert errors == []
        assert db.verify() == []


def test_a_damaged_store_is_not_compacted(store_path):
    with PromptDB(store_path) as db:
        fill(db, 20)
        identity = (store_path / "data.mdb").stat().st_ino

        def damage(writer):
            key, value = next(writer.scan(NODES))
            writer.put(NODES, key, bytes(value[:-1]) + b"?")

        db._index.transact(damage)
        with pytest.raises(CorruptDataError, match="verify --fix"):
            db.compact()
        assert (store_path / "data.mdb").stat().st_ino == identity
        assert not (store_path / COMPACT_FILE).exists()
        db.verify(fix=True)
        db.compact()
        assert db.verify() == []


def test_a_compaction_that_is_killed_leaves_the_old_file(store_path):
    script = """
    import promptdb.lifecycle, os, signal
    with PromptDB(path) as db:
        for at in range(20):
            put(db, [at], 10_000)
        promptdb.lifecycle.verify = lambda reader: os.kill(os.getpid(), signal.SIGKILL)
        db.compact()
    """
    process = start(script, store_path)
    assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    assert (store_path / COMPACT_FILE).exists()
    with PromptDB(store_path, readonly=True) as db:
        assert found(db, [19]) == 1
    with PromptDB(store_path) as db:
        assert not (store_path / COMPACT_FILE).exists()
        assert db.verify() == []
        db.compact()


def test_compacting_is_refused_to_readers(store_path):
    with PromptDB(store_path) as db:
        put(db, [1])
    with PromptDB(store_path, readonly=True) as db, pytest.raises(ReadOnlyStoreError):
        db.compact()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_holds_nothing(store_path):
    """A child that lives on, and never opens the store, must not stop its parent from compacting it."""
    with PromptDB(store_path) as db:
        put(db, [1])
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        os.close(reading)
        time.sleep(0.1)
        try:
            db.compact()
            assert found(db, [1]) == 1
        finally:
            os.close(writing)
            assert os.waitpid(child, 0)[1] == 0


# Damage that only another process could do


def test_a_writer_of_version_1_is_noticed(store_path):
    """It would not keep the accounting: what it leaves is named, and put right."""
    with PromptDB(store_path, chunk_tokens=16) as db:
        put(db, range(40))

        def old_writer(writer):
            node, data = next(writer.scan(NODES))
            writer.delete(LIFE, node)
            return node, bytes(data)

        db._index.transact(old_writer)
        assert "life" in {problem.table for problem in db.verify(fix=True)}
        assert db.verify() == []
        assert found(db, range(40)) == 40


def test_settings_of_a_store_keep_what_they_do_not_know(store_path):
    with PromptDB(store_path) as db:
        put(db, [1])

        def change(writer):
            fields = unpack_record(STORE_KEY, writer.get(META, STORE_KEY))
            writer.put(META, STORE_KEY, pack_record(STORE_KEY, {**fields, "later": 7, "format_version": 1}))
            for table in (LIFE, "queue"):
                for key in [key for key, _ in writer.scan(table)]:
                    writer.delete(table, key)
            writer.delete(META, b"usage")

        db._index.transact(change)
        put(db, [2])
        with db.read() as snapshot:
            fields = unpack_record(STORE_KEY, snapshot.reader.get(META, STORE_KEY))
        assert (fields["later"], fields["format_version"]) == (7, 2)
        assert db.verify() == []
