"""Many puts in one transaction: the same as one by one, all or nothing, and each by itself where one is bad."""

import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest
import torch
from db_tools import read_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from promptdb import PromptDB
from promptdb.blobs import TensorSpec, build_blob
from promptdb.cache import PromptCache
from promptdb.commits import PutRequest, SpanPayload
from promptdb.errors import PromptError, WriteBehindError
from promptdb.format import NODES, TABLES, Group
from promptdb.keys import Root, pack_tokens, unpack_tokens
from promptdb.kv import KvSource, load_cache, load_scores
from promptdb.scores import TokenScores
from promptdb.storer import Storer
from promptdb.testing import encode_tokens, scratch_directory
from promptdb.writer import WriteBehind

ROOT = Root("aa" * 32, "bb" * 32)
TIMEOUT_S = 60


def request(tokens, start=0, boundaries=(), logits=(), root=ROOT, chunk_tokens=16):
    packed = pack_tokens(tokens)
    blobs = {at: build_blob([(TensorSpec("logits", "F32", (1,)), at.to_bytes(4, "little"))]) for at in logits}
    return PutRequest(root, packed, start, encode_tokens(packed, boundaries, chunk_tokens), blobs)


def lookup(db, tokens):
    return db.lookup(tokens, model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).num_tokens


def content(db):
    """Return everything in a store but its settings and the times of its nodes."""
    with db.read() as snapshot:
        timed = (NODES, "meta", "life", "queue")
        tables = {name: list(snapshot.reader.scan(name)) for name in TABLES if name not in timed}
        found = {name: [(key, bytes(value)) for key, value in items] for name, items in tables.items()}
    return found, db.usage(), [(node, record._replace(created_unix_s=0.0)) for node, record in db.nodes()]


@pytest.fixture
def transactions(db, monkeypatch):
    """List the attempts at a transaction on ``db``; they go on while ``transactions.gate`` is set."""

    class Attempts(list):
        gate = threading.Event()
        entered = threading.Event()
        is_open = False

    attempts, transact = Attempts(), db._index.transact
    attempts.gate.set()

    def watched(work):
        def attempt(writer):
            attempts.append(work)
            attempts.entered.set()
            assert attempts.gate.wait(TIMEOUT_S)
            attempts.is_open = True
            try:
                return work(writer)
            finally:
                attempts.is_open = False

        return transact(attempt)

    monkeypatch.setattr(db._index, "transact", watched)
    return attempts


# PromptDB.put_many

PUTS = st.builds(
    lambda tokens, start, boundaries, logits, tenant: (
        tuple(tokens),
        min(start, len(tokens)),
        boundaries,
        {at for at in logits if at <= len(tokens)},
        Root("aa" * 32, "bb" * 32, tenant),
    ),
    st.lists(st.sampled_from([0, 0, 0, 1, 2**32 - 1]), max_size=14),
    st.sampled_from([0, 0, 0, 1, 3, 8]),
    st.lists(st.integers(0, 14), max_size=3),
    st.sets(st.integers(1, 14), max_size=2),
    st.sampled_from(["", "", "", "other"]),
)


def expect(puts):
    """Return (new tokens, is dropped) of each put, and what they leave: stored prefixes, prefixes with logits."""
    said, stored, with_logits = [], set(), set()
    for tokens, start, _, logits, root in puts:
        covered = 0
        while covered < len(tokens) and (root, tokens[: covered + 1]) in stored:
            covered += 1
        dropped = covered < start < len(tokens)
        if not dropped:
            reached = len(tokens) if start <= covered else covered
            stored |= {(root, tokens[:end]) for end in range(1, reached + 1)}
            with_logits |= {(root, tokens[:at]) for at in logits if at <= reached}
        said.append((len(tokens) - covered if start <= covered else 0, dropped))
    return said, stored, with_logits


def check_groups(db, groups):
    requests = [[request(*put, 5) for put in group] for group in groups]
    transact, attempts = db._index.transact, []
    db._index.transact = lambda work: attempts.append(work) or transact(work)
    reports = [report for group in requests for report in db.put_many(group)]
    assert len(attempts) <= 2 * len(groups)
    with PromptDB.in_memory(chunk_tokens=5) as single:
        assert reports == [
            single.put(each.root, each.packed, each.start, each.encode, each.logits)
            for group in requests
            for each in group
        ]
        assert content(db) == content(single)
    said, stored, with_logits = expect([put for group in groups for put in group])
    assert [(report.num_tokens, report.num_dropped > 0) for report in reports] == said
    assert db.stat()["num_tokens"] == len(stored)
    assert db.stat()["num_logits"] == len(with_logits)
    assert db.verify() == []


@settings(max_examples=250, deadline=None)
@given(st.lists(st.lists(PUTS, max_size=7), max_size=3))
def test_groups_leave_what_single_puts_leave(groups):
    with PromptDB.in_memory(chunk_tokens=5) as db:
        check_groups(db, groups)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(PUTS, max_size=7), max_size=3))
def test_groups_leave_what_single_puts_leave_on_disk(groups):
    directory = scratch_directory()
    try:
        with PromptDB(directory / "store", chunk_tokens=5, map_bytes=1) as db:
            check_groups(db, groups)
    finally:
        shutil.rmtree(directory)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.lists(PUTS, max_size=5), st.lists(st.integers(0, 20), max_size=3)), min_size=2, max_size=4)
)
def test_groups_leave_what_single_puts_leave_where_spans_were_removed(rounds):
    """Spans are removed from under others, which are reached again when a put brings back what they stood on."""
    with PromptDB.in_memory(chunk_tokens=5) as db, PromptDB.in_memory(chunk_tokens=5) as single:
        for puts, removals in rounds:
            made = [request(*put, 5) for put in puts]
            reports = [single.put_many([each])[0] for each in made]
            assert db.put_many(made) == reports
            nodes = [node for node, _ in db.nodes()]
            for node in {nodes[at] for at in removals if at < len(nodes)}:
                assert db.remove(node, only=True) == single.remove(node, only=True) == 1
            assert content(db) == content(single)
        assert db.verify() == single.verify()


def test_overlaps_inside_a_group(db, transactions):
    """A chain, in which each shares more with the one before it: all are encoded again, once, outside of
    transactions, though an overlap depends on what the one before it will store."""
    asked = []

    def noting(tokens):
        made = request(tokens)

        def encode(position):
            assert not transactions.is_open
            asked.append((len(tokens), position))
            return made.encode(position)

        return PutRequest(made.root, made.packed, 0, encode)

    # Each leaves the one before it after 2, 5, 8, ... tokens, which is in the middle of what that one stores.
    shared, prompts = [0, 2, 5, 8, 11, 14], [[]]
    for n, length in enumerate(shared):
        prompts.append([*prompts[-1][:length], *range(100 * n, 100 * n + 12)])
    del prompts[0]
    reports = db.put_many([noting(prompt) for prompt in prompts])
    assert [report.num_tokens for report in reports] == [12] * 6
    assert len(transactions) == 2
    lengths = [len(prompt) for prompt in prompts]
    assert asked == [(length, 0) for length in lengths] + list(zip(lengths, shared, strict=True))[1:]
    assert all(lookup(db, prompt) == len(prompt) for prompt in prompts)


def test_what_others_store_meanwhile_is_kept(db):
    made = [request([first, *range(12)]) for first in (1, 2, 3)]

    def encode(position):
        if position == 0:
            db.put_many([request([first, *range(5)]) for first in (1, 3)])
        return made[2].encode(position)

    reports = db.put_many([*made[:2], PutRequest(ROOT, made[2].packed, 0, encode)])
    assert [report.num_tokens for report in reports] == [7, 13, 7]
    assert db.stat()["num_tokens"] == 39


def test_a_request_may_stand_on_one_before_it_but_not_after(db):
    first, second = request(range(20)), request(range(30), start=20, logits=[30])
    (alone,) = db.put_many([second])
    assert (alone.num_tokens, alone.num_dropped) == (0, 1)
    assert [report.num_dropped for report in db.put_many([second, first])] == [1, 0]
    assert [report.num_tokens for report in db.put_many([first, second])] == [0, 10]
    assert db.lookup(range(30), model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).is_complete


def fail(position):
    raise ZeroDivisionError


def garbled(tokens):
    """Return a request that fails in the middle of its transaction: its second record cannot be packed."""
    half = len(tokens) // 2
    spans = [
        SpanPayload(start, end, (), {"x": bytes(5000)}, 0.0, {"number": number})
        for start, end, number in ((0, half, 1), (half, len(tokens), 1 << 70))
    ]
    return PutRequest(ROOT, pack_tokens(tokens), 0, lambda position: spans)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (PutRequest(ROOT, pack_tokens([7]), 0, fail), ZeroDivisionError),
        (PutRequest(ROOT, b"abc", 0, fail), PromptError),
        (PutRequest(ROOT, pack_tokens([7]), 0, lambda position: [], {2: b""}), PromptError),
        (PutRequest(ROOT, pack_tokens([7]), 0, encode_tokens(pack_tokens([7, 8]))), PromptError),
        (garbled([5, 6, 7, 8]), OverflowError),
    ],
)
def test_a_group_is_stored_whole_or_not_at_all(db, bad, error):
    db.put_many([request(range(10))])
    before = content(db)
    with pytest.raises(error):
        db.put_many([request([*range(10), 99]), bad, request([8])])
    assert content(db) == before


def test_no_requests_are_no_transaction(db, transactions):
    assert db.put_many([]) == []
    assert transactions == []


def test_checksums_are_computed_once_though_the_map_grows(store_path, monkeypatch):
    from promptdb import commits

    checksum, keys, attempts = commits.checksum, [], []
    monkeypatch.setattr(commits, "checksum", lambda key, blob: keys.append(key) or checksum(key, blob))
    with PromptDB(store_path, map_bytes=1) as db:
        commit = db._index._commit
        monkeypatch.setattr(db._index, "_commit", lambda work: attempts.append(work) or commit(work))
        blob = {"x": build_blob([(TensorSpec("x", "U8", (300_000,)), bytes(300_000))])}
        made = [
            PutRequest(ROOT, pack_tokens([n]), 0, lambda start: [SpanPayload(0, 1, (), blob, 0.0, {})])
            for n in range(20)
        ]
        db.put_many(made)
        assert len(attempts) > 3
        assert len(keys) == len(set(keys)) == 20
        assert db.stat()["num_nodes"] == 20
        assert db.verify() == []


# WriteBehind


def test_what_waits_shares_a_transaction(db, transactions):
    queue = WriteBehind(db.put_many)
    transactions.gate.clear()
    chain = list(range(400))
    queue.submit(request(chain[:2]), 1)
    assert transactions.entered.wait(TIMEOUT_S)
    for end in range(4, 401, 2):  # each stands on the one before it
        queue.submit(request(chain[:end], start=end - 2), 1)
    assert len(transactions) == 1
    transactions.gate.set()
    queue.close()
    assert len(transactions) == 2
    assert lookup(db, chain) == 400
    assert db.stat()["num_nodes"] == 200


def test_a_transaction_has_a_bound():
    groups, gate, entered = [], threading.Event(), threading.Event()

    def commit(requests):
        groups.append([each.start for each in requests])
        entered.set()
        assert gate.wait(TIMEOUT_S)

    queue = WriteBehind(commit, max_group_bytes=100)
    queue.submit(PutRequest(ROOT, b"", -1, fail), 5)
    assert entered.wait(TIMEOUT_S)
    for size_bytes in (60, 30, 20, 500, 99, 1, 0, 0, 1):
        queue.submit(PutRequest(ROOT, b"", size_bytes, fail), size_bytes)
    for _ in range(3000):
        queue.submit(PutRequest(ROOT, b"", 0, fail), 0)
    gate.set()
    queue.flush()
    assert groups[:5] == [[-1], [60, 30], [20], [500], [99, 1, 0, 0]]
    assert groups[5] == [1, *[0] * 1023]
    assert list(map(len, groups[6:])) == [1024, 953]
    queue.close()


def test_a_bad_request_takes_no_others_with_it(db, transactions):
    queue = WriteBehind(db.put_many)
    transactions.gate.clear()
    queue.submit(request([0]), 1)
    assert transactions.entered.wait(TIMEOUT_S)
    for n in range(1, 10):
        bad = PutRequest(ROOT, pack_tokens([n]), 0, fail) if n == 3 else garbled([n, 1, 1, 1])
        queue.submit(bad if n in (3, 7) else request([n, n]), 1)
    queue.submit(request([3, 5], start=1), 1)  # stands on what fails
    transactions.gate.set()
    with pytest.raises(WriteBehindError, match=r"and 1 more.*ZeroDivisionError") as caught:
        queue.flush()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    queue.flush()  # reported once
    assert [lookup(db, [n, n]) for n in range(10)] == [1, 2, 2, 0, 2, 2, 2, 0, 2, 2]
    assert lookup(db, [3, 5]) == 0
    queue.submit(request([3, 3]), 1)
    queue.close()
    assert lookup(db, [3, 3]) == 2


def test_a_lookup_waits_for_its_group_and_no_longer(db, transactions):
    queue = WriteBehind(db.put_many, max_group_bytes=2)
    transactions.gate.clear()
    for first in range(5):  # groups: at most two each
        queue.submit(request([first, 7], logits=[1]), 1)
    assert not queue.wait_for(ROOT, pack_tokens([5, 7]), 0, has_logits=False)
    assert not queue.wait_for(ROOT, pack_tokens([0, 7]), 2, has_logits=True)
    answers = []

    def wait(packed, stored, has_logits):
        waited = queue.wait_for(ROOT, packed, stored, has_logits=has_logits)
        answers.append((waited, lookup(db, [4, 7])))

    waiting = [(pack_tokens([4, 7]), 0, True), (pack_tokens([4, 7, 9]), 1, True), (pack_tokens([4, 8]), 1, False)]
    threads = [threading.Thread(target=wait, args=each) for each in waiting]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert answers == []
    transactions.gate.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert answers == [(True, 2)] * 3
    queue.close()


def test_a_submission_that_waited_while_the_queue_was_closed_is_refused():
    """Its thread has ended, or is about to: nobody would commit it, and flush would wait for ever."""
    committed, gate, entered = [], threading.Event(), threading.Event()

    def commit(requests):
        entered.set()
        assert gate.wait(TIMEOUT_S)
        committed.extend(requests)

    queue = WriteBehind(commit, max_pending_bytes=1)
    queue.submit(request([1]), 1)
    assert entered.wait(TIMEOUT_S)
    refused = []

    def submit():
        with pytest.raises(WriteBehindError, match="closed"):
            queue.submit(request([2]), 1)
        refused.append(True)

    submitter = threading.Thread(target=submit)
    submitter.start()
    while not queue._condition._waiters:
        time.sleep(0.001)
    queue.flush = lambda: None  # it has returned just before the submission gets its turn
    closer = threading.Thread(target=queue.close)
    closer.start()
    while not queue._stopping:
        time.sleep(0.001)
    assert committed == refused == []
    gate.set()
    for thread in (submitter, closer):
        thread.join(TIMEOUT_S)
    assert (len(committed), refused) == (1, [True])


KILLED = """
import random, sys
from promptdb import PromptDB
from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import PutRequest, SpanPayload
from promptdb.keys import Root, pack_tokens
from promptdb.writer import WriteBehind

path, seed = sys.argv[1], int(sys.argv[2])
root, source = Root("aa" * 32, "bb" * 32), random.Random(seed)
db = PromptDB(path, chunk_tokens=64, map_bytes=1)
largest = 0

def commit(requests):
    global largest
    db.put_many(requests)
    largest = max(largest, len(requests))

def request(tokens, start):
    packed = pack_tokens(tokens)
    def encode(position):
        blob = build_blob([(TensorSpec("tokens", "U32", (len(tokens) - position,)), packed[4 * position :])])
        return [SpanPayload(position, len(tokens), (), {"tokens": blob}, 0.0, {})]
    return PutRequest(root, packed, start, encode)

queue, number = WriteBehind(commit), 0
while True:
    for _ in range(source.randint(1, 40)):
        tokens = [1000 + seed, number, *range(number * 37 % 300)]
        half = len(tokens) // 2
        queue.submit(request(tokens[:half], 0), 4 * half)
        queue.submit(request(tokens, half), 4 * len(tokens))
        number += 1
    if source.random() < 0.5:
        db.put_many([request([2000 + seed, number, each, *range(1000)], 0) for each in range(30)])
    queue.flush()
    print(number, largest, flush=True)
"""


def test_killed_in_the_middle_of_groups(store_path):
    """What was flushed is there, whole and sound; of what one call puts, all or nothing is there."""
    source, flushed, largest = random.Random(3), {}, 0
    for seed in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(store_path), str(seed)], stdout=subprocess.PIPE, text=True
        )
        first = process.stdout.readline()
        time.sleep(source.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        lines = [first, *process.stdout.read().splitlines(keepends=True)]
        process.wait(TIMEOUT_S)
        for line in lines:
            if line.endswith("\n"):
                flushed[seed], most = map(int, line.split())
                largest = max(largest, most)
    assert largest > 10
    assert sum(flushed.values()) > 200
    with PromptDB(store_path) as db:
        assert db.verify() == []
        for seed, count in flushed.items():
            for number in range(count):
                tokens = [1000 + seed, number, *range(number * 37 % 300)]
                assert read_tokens(db, tokens) == pack_tokens(tokens)
        starts = [tuple(unpack_tokens(record.span)[:2]) for _, record in db.nodes() if record.start == 0]
        groups = {start for start in starts if start[0] >= 2000}
        assert len(groups) > 3
        for start in groups:
            assert [lookup(db, [*start, each, *range(1000)]) for each in range(30)] == [1003] * 30


# Storer

LAYOUT = (Group((0, 1, 2, 3), 2, 4, "F32"),)


def store(storer, tokens, cuts, logits=(), shift=0):
    """Store random keys and values of a prompt; return them."""
    total, first, last = len(tokens), cuts[0] + shift, len(tokens) + shift
    states = torch.randn(4, 2, total, 4, generator=torch.Generator().manual_seed(sum(tokens)))
    cache = PromptCache.of_layout(LAYOUT, last, last + 5, torch.device("cpu"))
    cache.stacks(LAYOUT)[0].fill_(-1)
    cache.stacks(LAYOUT)[0][:, :, first:last] = states[:, :, cuts[0] :]
    scores = TokenScores(torch.arange(total, dtype=torch.float32), torch.arange(total, dtype=torch.int32))
    rows = {at - 1: torch.full((3,), float(at)) for at in logits}
    spans = list(pairwise(cuts))
    options = {"compute_s_per_token": 0.1, "provenance": {}, "shift": shift}
    storer.store(ROOT, pack_tokens(tokens), spans, KvSource(cache), scores[cuts[0] :], rows, **options)
    cache.stacks(LAYOUT)[0].zero_()  # it may be changed once that returned
    return states


def loaded(db, tokens):
    with db.read() as snapshot:
        match = snapshot.match(ROOT, pack_tokens(tokens))
        assert match.is_complete
        cache, _ = load_cache(snapshot, match, len(tokens), len(tokens), torch.device("cpu"))
        scores = load_scores(snapshot, match, len(tokens))
        assert scores.logprobs.tolist() == scores.greedy_ids.tolist() == list(range(len(tokens)))
        return cache.stacks(LAYOUT)[0].clone()


@pytest.mark.parametrize("write_behind", [False, True])
def test_stored_together(db, transactions, write_behind):
    storer = Storer(db, write_behind=write_behind)
    with storer.together():
        first = store(storer, range(10), [0, 4, 10], [10])
        with storer.together():
            second = store(storer, [*range(7), 50, 51], [0, 9], [9], 3)  # shares half a span: it is trimmed
            third = store(storer, [*range(10), 8, 9], [10, 12], [12], -10)
        assert write_behind or transactions == []
    storer.queue.flush()
    assert write_behind or len(transactions) == 2  # one that met the overlap, one that stored all
    assert torch.equal(loaded(db, range(10)), first)
    assert torch.equal(loaded(db, [*range(7), 50, 51])[:, :, 7:], second[:, :, 7:])
    assert torch.equal(loaded(db, [*range(10), 8, 9])[:, :, 10:], third[:, :, 10:])
    store(storer, [9, 9], [0, 2])
    storer.queue.close()
    assert lookup(db, [9, 9]) == 2
    assert storer.queue._thread is None or write_behind


def test_another_thread_is_not_together(db, transactions):
    storer = Storer(db, write_behind=False)
    with storer.together():
        store(storer, [1, 2], [0, 2])
        thread = threading.Thread(target=store, args=(storer, [3, 4], [0, 2]))
        thread.start()
        thread.join(TIMEOUT_S)
        assert (lookup(db, [1, 2]), lookup(db, [3, 4])) == (0, 2)
    assert lookup(db, [1, 2]) == 2


@pytest.mark.parametrize("write_behind", [False, True])
def test_what_was_stored_before_an_error_stays(db, write_behind):
    storer = Storer(db, write_behind=write_behind)

    def block():
        with storer.together():
            store(storer, [1, 2], [0, 2])
            fail(0)

    with pytest.raises(ZeroDivisionError):
        block()
    storer.queue.flush()
    assert lookup(db, [1, 2]) == 2
    store(storer, [3], [0, 1])  # not collected for ever
    storer.queue.close()
    assert lookup(db, [3]) == 1
