"""Several processes and threads on one store: races, growth of the map, kills, forks."""

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
from promptdb.errors import PromptDBError, StoreError
from promptdb.keys import Root, pack_tokens
from promptdb.testing import encode_tokens

ROOT = Root("aa" * 32, "bb" * 32)
TIMEOUT_S = 60

PRELUDE = """
import random, sys, time
from promptdb import PromptDB
from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import SpanPayload
from promptdb.keys import Root, pack_tokens
from promptdb.trie import cut

ROOT = Root("aa" * 32, "bb" * 32)
path, seed = sys.argv[1], int(sys.argv[2])
source = random.Random(seed)

def put(db, tokens, boundaries=(), start=0):
    packed = pack_tokens(tokens)  # as promptdb.testing.encode_tokens, whose imports would take a second
    def encode(position):
        spans = []
        for begin, end in cut(position, len(tokens), boundaries, db.chunk_tokens):
            blob = build_blob([(TensorSpec("tokens", "U32", (end - begin,)), packed[4 * begin : 4 * end])])
            spans.append(SpanPayload(begin, end, (), {"tokens": blob}, 0.0, {}))
        return spans
    return db.put(ROOT, packed, start, encode)

def lookup(db, tokens):
    return db.lookup(tokens, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).num_tokens

def wait():
    print("ready", flush=True)
    sys.stdin.readline()
"""


def start(script, path, seed=0):
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), str(path), str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def go_together(processes):
    """Let processes that called ``wait()`` run on at once; return what each printed."""
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return outputs


def put(db, tokens, boundaries=()):
    packed = pack_tokens(tokens)
    return db.put(ROOT, packed, 0, encode_tokens(packed, boundaries, db.chunk_tokens))


def lookup(db, tokens):
    return db.lookup(tokens, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).num_tokens


def check_content(db, tokens):
    """Assert that the blobs along a prompt hold its tokens."""
    packed, found = pack_tokens(tokens), b""
    with db.read() as snapshot:
        for step in snapshot.match(ROOT, packed).steps:
            record = snapshot.record(step.node)
            found += bytes(snapshot.blob(step.node, record, "tokens")["tokens"].data)[: 4 * step.num_tokens]
    assert found == packed


def test_two_processes_create_and_put_the_same(store_path):
    script = """
    wait()
    with PromptDB(path, chunk_tokens=16, map_bytes=1) as db:
        written = [put(db, [n // 10, n, *range(50)]).num_tokens for n in range(60)]
    print(sum(written))
    """
    written = [int(output) for output in go_together([start(script, store_path, seed) for seed in range(2)])]
    with PromptDB(store_path) as db:
        assert db.verify() == []
        assert db.chunk_tokens == 16
        assert sum(written) == db.stat()["num_tokens"] == 60 * 51 + 6  # each token was stored once, by one of them
        for n in range(60):
            check_content(db, [n // 10, n, *range(50)])


def test_different_cuts_at_once_make_one_trie(store_path):
    """Both found nothing before they computed, and cut the same prompts in different places."""
    script = """
    with PromptDB(path, chunk_tokens=32) as db:
        wait()
        for n in range(40):
            boundaries = sorted(source.sample(range(1, 100), 6))
            put(db, [n // 4, *range(source.randint(60, 100))], boundaries)
    """
    go_together([start(script, store_path, seed) for seed in range(3)])
    with PromptDB(store_path) as db:
        assert db.verify() == []
        # 10 families, of which everything stored is one line: its tokens are counted once if nothing overlaps.
        longest = [lookup(db, [family, *range(100)]) for family in range(10)]
        assert db.stat()["num_tokens"] == sum(longest)
        assert all(60 < length <= 101 for length in longest)
        for family, length in enumerate(longest):
            check_content(db, [family, *range(100)][:length])


def test_one_process_grows_the_map_while_another_reads_and_writes(store_path):
    grow = """
    with PromptDB(path, map_bytes=1) as db:
        wait()
        for n in range(150):
            put(db, [1, n, *range(3000)])
        print(db.stat()["map_bytes"])
    """
    with PromptDB(store_path, map_bytes=1) as db:
        before = db.stat()["map_bytes"]
        process = start(grow, store_path)
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        puts = 0
        while process.poll() is None:
            put(db, [2, puts])
            puts += 1
            assert lookup(db, [2, puts - 1]) == 2
            seen = lookup(db, [1, puts % 150, *range(3000)])
            assert seen in (0, 1, 3002)
            if seen == 3002:
                check_content(db, [1, puts % 150, *range(3000)])
        assert process.returncode == 0
        assert int(process.stdout.read()) >= 8 * before
        for n in range(150):
            check_content(db, [1, n, *range(3000)])
        assert db.verify() == []
        assert puts > 5


def test_killed_writers_leave_a_sound_store(store_path):
    """What was acknowledged is there, whenever the writer dies; nothing half written shows."""
    script = """
    db = PromptDB(path, chunk_tokens=64, map_bytes=1)
    n = 0
    while True:
        tokens = [1000 * seed + n, *range(source.randint(1, 400))]
        put(db, tokens, [source.randint(1, 50)])
        print(len(tokens), flush=True)
        n += 1
        if n % 5 == 0:
            node = db.lookup([1000 * seed + n - 3], model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).steps[-1].node
            db.remove(node)
            print("removed", n - 3, flush=True)
    """
    source = random.Random(5)
    alive = {}
    for seed in range(15):
        process = start(script, store_path, seed)
        first = process.stdout.readline()
        time.sleep(source.uniform(0.0, 0.08))
        process.send_signal(signal.SIGKILL)
        lines = [first, *process.stdout.read().splitlines(keepends=True)]
        process.wait(TIMEOUT_S)
        lengths, removed = [], set()
        for line in lines:
            if not line.endswith("\n"):
                continue
            if line.startswith("removed"):
                removed.add(int(line.split()[1]))
            else:
                lengths.append(int(line))
        # A removal that was committed but not yet reported may take the one that was due.
        due = len(lengths) - 3 if len(lengths) % 5 == 0 else None
        alive[seed] = {n: length for n, length in enumerate(lengths) if n not in removed and n != due}
    assert sum(map(len, alive.values())) > 30
    with PromptDB(store_path) as db:
        assert db.verify() == []
        for seed, prompts in alive.items():
            for n, length in prompts.items():
                tokens = [1000 * seed + n, *range(length - 1)]
                assert lookup(db, tokens) == length
                check_content(db, tokens)


def test_readers_that_are_killed_do_not_hold_pages_for_ever(store_path):
    script = """
    db = PromptDB(path, readonly=True)
    with db.read():
        wait()
    """
    with PromptDB(store_path) as db:
        put(db, range(10))
    process = start(script, store_path)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait(TIMEOUT_S)
    with PromptDB(store_path) as db:
        assert db.stat()["num_readers"] <= 1


def in_child(work):
    """Run ``work`` in a forked child; return what it returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, work().encode())
        except BaseException as error:  # noqa: BLE001
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return answer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_is_refused_its_parents_handle(store_path):
    db = PromptDB(store_path)
    put(db, range(10))
    for use in (lambda: lookup(db, range(10)), lambda: put(db, [5]), db.stat, db.verify):
        answer = in_child(lambda use=use: str(use()))
        assert answer.startswith("StoreError")
        assert "forked" in answer
        assert "open it in the child" in answer

    def own():
        db.close()  # harmless: it is the parent's
        with PromptDB(store_path) as mine:
            put(mine, [*range(10), 77])
            return str(lookup(mine, range(10)))

    with db.read() as snapshot:
        before = [bytes(key) for key, _ in snapshot.reader.scan("nodes")]
        assert in_child(own) == "10"
        assert [bytes(key) for key, _ in snapshot.reader.scan("nodes")] == before
    assert lookup(db, [*range(10), 77]) == 11
    put(db, [8])
    assert db.verify() == []
    db.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_while_threads_write(store_path):
    """Locks that another thread held at the fork must not stop the child from opening its own handle."""
    db = PromptDB(store_path)
    stop = threading.Event()

    def work():
        n = 0
        while not stop.is_set():
            put(db, [n, *range(100)])
            n += 1

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()

    def own():
        signal.alarm(TIMEOUT_S)
        try:
            lookup(db, [1])
        except StoreError:
            with PromptDB(store_path) as mine:
                put(mine, [2**31])
            return "opened"
        return "not refused"

    answers = [in_child(own) for _ in range(10)]
    stop.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert answers == ["opened"] * 10
    assert db.verify() == []
    db.close()


def test_threads_on_one_handle_while_the_map_grows(store_path):
    errors = []
    with PromptDB(store_path, chunk_tokens=64, map_bytes=1) as db:
        before = db.stat()["map_bytes"]

        def work(seed):
            source = random.Random(seed)
            try:
                for n in range(60):
                    tokens = [source.randrange(3), source.randrange(3), seed, n, *range(source.randint(0, 600))]
                    put(db, tokens, [source.randint(1, 50)])
                    check_content(db, tokens)
                    lookup(db, [source.randrange(3), source.randrange(3), source.randrange(4), source.randrange(60)])
                    if n % 10 == 9:
                        sum(1 for _ in db.nodes())
            except (PromptDBError, AssertionError, AttributeError) as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert errors == []
        assert db.stat()["map_bytes"] >= 4 * before
        assert db.verify() == []


def test_closing_waits_for_readers(store_path):
    """Views die with the map: closing under a reader would crash the process."""
    db = PromptDB(store_path)
    put(db, range(10))
    inside, leave = threading.Event(), threading.Event()
    seen = []

    def read():
        with db.read() as snapshot:
            (value,) = [value for _, value in snapshot.reader.scan("blobs")]
            inside.set()
            leave.wait(TIMEOUT_S)
            seen.append(bytes(value))

    reader = threading.Thread(target=read)
    reader.start()
    assert inside.wait(TIMEOUT_S)
    closer = threading.Thread(target=db.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    leave.set()
    reader.join(TIMEOUT_S)
    closer.join(TIMEOUT_S)
    assert not closer.is_alive()
    assert len(seen[0]) > 40


def test_a_snapshot_may_end_in_another_thread(store_path):
    """As one does that a generator holds, when that is collected elsewhere."""
    with PromptDB(store_path, map_bytes=1) as db:
        held = db.read()
        held.__enter__()
        thread = threading.Thread(target=held.__exit__, args=(None, None, None))
        thread.start()
        thread.join(TIMEOUT_S)
        for n in range(200):
            put(db, [n, *range(1000)])  # grows the map, for which no snapshot may be open
        assert db.verify() == []
