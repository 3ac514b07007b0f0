"""Quota, time to live, last use and collecting: one rule at a time."""

import math

import pytest
from limits_tools import ROOT, a_clock, charged, dated_db, found, lives, put  # noqa: F401 - fixtures

from promptdb import PromptDB
from promptdb.access import AccessLog
from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import PutRequest, SpanPayload
from promptdb.errors import (
    InputTypeError,
    QuotaExceededError,
    ReadOnlyStoreError,
    StoreError,
    StoreFullError,
)
from promptdb.format import BLOBS, CHILDREN, LABELS, LIFE, META, QUEUE
from promptdb.keys import Root, pack_tokens
from promptdb.labels import Label, label_key
from promptdb.life import USAGE_KEY

# Quota


def test_a_quota_is_set_when_the_store_is_created_and_kept(tmp_path):
    with PromptDB(tmp_path / "store", quota_bytes=10**6, policy="lru") as db:
        assert (db.limits().quota_bytes, db.limits().policy) == (10**6, "lru")
    with PromptDB(tmp_path / "store", quota_bytes=10**6) as db, PromptDB(tmp_path / "store") as other:
        assert db.stat()["quota_bytes"] == 10**6
        db.set_quota(2 * 10**6)
        assert other.limits().quota_bytes == 2 * 10**6
    with pytest.raises(StoreError, match=r"quota_bytes=2000000, not 5.*set_quota"):
        PromptDB(tmp_path / "store", quota_bytes=5)
    with pytest.raises(StoreError, match=r"policy='lru', not 'cost'"):
        PromptDB(tmp_path / "store", policy="cost")


@pytest.mark.parametrize(
    ("options", "error"),
    [({"quota_bytes": -1}, StoreError), ({"quota_bytes": 2**62}, StoreError), ({"quota_bytes": "1"}, InputTypeError),
     ({"quota_bytes": True}, InputTypeError), ({"policy": "random"}, StoreError), ({"ttl_s": 0}, StoreError),
     ({"ttl_s": -1.0}, StoreError), ({"ttl_s": math.nan}, StoreError), ({"ttl_s": "7d"}, InputTypeError),
     ({"ttl_s": True}, InputTypeError)],
    ids=str,
)  # fmt: skip
def test_limits_that_cannot_be(tmp_path, options, error):
    with pytest.raises(error):
        PromptDB(tmp_path / "store", **options)
    with pytest.raises(error):
        PromptDB.in_memory(**options)
    assert not (tmp_path / "store").exists()


def test_what_is_put_makes_the_oldest_go(db):
    db.set_quota(100_000, policy="lru")
    for first in range(200):
        db._clock.now += 1
        put(db, [first, *range(31)], size=3000)
        assert charged(db) <= 100_000
    stored = [first for first in range(200) if found(db, [first, *range(31)]) == 32]
    assert stored == list(range(200 - len(stored), 200))
    assert 5 < len(stored) < 20
    usage = db.usage()
    assert usage["num_evicted"] == 2 * 200 - db.stat()["num_nodes"]
    assert usage["evicted_bytes"] > 10 * 100_000


def test_a_put_larger_than_the_quota_is_refused_and_evicts_nothing(db):
    db.set_quota(50_000)
    put(db, range(16), size=20_000)
    before = db.stat()
    with pytest.raises(
        QuotaExceededError, match=r"the quota is 50,000 bytes: the put and what it stands on take"
    ) as error:
        put(db, range(100, 200), size=20_000)
    assert "promptdb limits --quota" in error.value.hint
    assert isinstance(error.value, OSError)
    assert not isinstance(error.value, StoreFullError)
    with pytest.raises(QuotaExceededError):  # with what it stands on
        put(db, range(40), size=20_000)
    changing = {"file_bytes": 0, "used_bytes": 0, "free_bytes": 0}
    assert {**db.stat(), **changing} == {**before, **changing}
    assert found(db, range(16)) == 16
    put(db, range(100, 116), size=20_000)


def test_a_put_to_the_byte_of_the_quota(db):
    put(db, range(16))
    size = charged(db)
    db.gc(0)
    db.set_quota(size)
    put(db, range(16))
    assert charged(db) == size
    db.gc(0)
    db.set_quota(size - 1)
    with pytest.raises(QuotaExceededError):
        put(db, range(16))
    assert charged(db) == 0


def test_many_in_one_transaction_are_within_the_quota_or_none_is(db):
    db.set_quota(60_000)

    def request(first):
        blob = bytes(build_blob([(TensorSpec("x", "U8", (10_000,)), bytes(10_000))]))
        tokens = pack_tokens([first])
        return PutRequest(ROOT, tokens, 0, lambda start: [SpanPayload(0, 1, (), {"x": blob}, 1.0, {})])

    put(db, [1000])
    with pytest.raises(QuotaExceededError):
        db.put_many([request(first) for first in range(10)])
    assert found(db, [1000]) == 1
    assert db.stat()["num_nodes"] == 1
    db.put_many([request(first) for first in range(4)])
    assert charged(db) <= 60_000


def test_what_a_put_stands_on_is_not_evicted(db):
    db.set_quota(40_000, policy="fifo")
    put(db, range(16), size=3000)
    put(db, range(32), size=3000)
    for first in range(100, 140):
        db._clock.now += 1
        put(db, [*range(32), first], size=3000)
        assert found(db, [*range(32), first]) == 33


def test_a_prompt_that_only_gets_logits_stays(db):
    """Its last span is a leaf, first in line, and nothing new stands on it."""
    db.set_quota(40_000, policy="fifo")
    put(db, range(16), size=3000)
    while db.usage()["num_evicted"] == 0 and found(db, range(16)) == 16:
        db._clock.now += 1
        size = charged(db)
        if size + 9000 > 40_000:
            break
        put(db, [1000 + size], size=3000)
    logits = bytes(build_blob([(TensorSpec("logits", "F32", (4000,)), bytes(16_000))]))
    put(db, range(16), logits={16: logits})
    assert db.lookup(list(range(16)), model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id).is_complete
    assert db.usage()["num_evicted"] > 0


def test_logits_go_with_their_span(db):
    logits = bytes(build_blob([(TensorSpec("logits", "F32", (500,)), bytes(2000))]))
    put(db, range(16), logits={16: logits, 8: logits})
    put(db, [7])
    assert db.stat()["num_logits"] == 2
    assert db.gc(charged(db) - 1).num_evicted == 1
    assert db.stat()["num_logits"] == (0 if found(db, [7]) else 2)
    db.gc(0)
    assert (db.stat()["num_logits"], charged(db), db.roots()) == (0, 0, [])


def test_a_lower_quota_evicts_at_once(db):
    for first in range(100):
        put(db, [first])
    before = charged(db)
    db.set_quota(before // 2)
    assert before // 2 * 0.9 < charged(db) <= before // 2
    db.set_quota(0)
    for first in range(100):
        put(db, [first])
    assert charged(db) == before
    with pytest.raises(QuotaExceededError, match="the policy is ttl"):
        db.set_quota(before // 2, policy="ttl")
    assert (db.limits().quota_bytes, db.limits().policy, charged(db)) == (0, "cost", before)


def test_ttl_policy_evicts_only_what_has_expired(db, clock):
    db.set_quota(24_000, policy="ttl")
    put(db, [1], size=8000, ttl_s=10.0)
    put(db, [2], size=8000)
    with pytest.raises(QuotaExceededError, match="what has not expired takes"):
        put(db, [3], size=8000)
    clock.now += 11
    put(db, [3], size=8000)
    assert [found(db, [first]) for first in (1, 2, 3)] == [0, 1, 1]
    assert (db.usage()["num_expired"], db.usage()["num_evicted"]) == (1, 0)


def test_cost_keeps_what_took_long(db, clock):
    db.set_quota(100_000)
    put(db, [1], size=3000, compute_s=60.0)
    for first in range(100, 160):
        clock.now += 100
        put(db, [first], size=3000, compute_s=0.1)
    assert found(db, [1]) == 1
    for first in range(1000, 1100):  # but not for ever, if it is never used
        clock.now += 100
        put(db, [first], size=3000, compute_s=50.0)
    assert found(db, [1]) == 0


def test_use_keeps(db, clock):
    db.set_quota(100_000, policy="lru")
    put(db, [1], size=3000)
    for first in range(100, 200):
        clock.now += 100
        put(db, [first], size=3000)
        assert found(db, [1]) == 1


def test_a_use_of_a_prompt_is_one_of_all_its_spans(db, clock):
    put(db, range(64))
    clock.now += 1000
    found(db, range(64))
    db.flush_accesses()
    assert {life.used_unix_s for life in lives(db).values()} == {clock.now}


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
def test_times_of_computing_that_cannot_be(db, seconds):
    put(db, range(16), compute_s=seconds)
    put(db, [1])
    db.set_quota(charged(db) - 1)
    assert db.stat()["num_nodes"] == 1


def test_every_policy_can_be_changed_to_every_other(db, clock):
    db.set_quota(60_000)
    for round_, policy in enumerate(["lru", "fifo", "cost", "lru", "ttl", "cost", "ttl", "fifo"]):
        db.set_quota(None, policy=policy)
        for first in range(30):
            clock.now += 70
            if policy != "ttl":
                put(db, [round_, first], size=2000)
        assert db.verify() == []
        assert db.limits().quota_bytes == 60_000


# Time to live


def test_what_has_expired_is_a_miss(db, clock):
    put(db, range(32), ttl_s=100.0)
    assert found(db, range(32)) == 32
    clock.now += 99
    assert found(db, range(32)) == 32
    clock.now += 1
    match = db.lookup(list(range(32)), model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id)
    assert (match.num_tokens, match.steps, match.has_logits) == (0, (), False)
    assert db.gc().num_expired == 2
    assert charged(db) == 0


def test_a_lookup_ends_where_a_prompt_has_expired(db, clock):
    logits = bytes(build_blob([(TensorSpec("logits", "F32", (4,)), bytes(16))]))
    put(db, range(16), ttl_s=100.0, logits={16: logits})
    put(db, range(40), ttl_s=10.0)
    clock.now += 50
    match = db.lookup(list(range(40)), model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id)
    assert (match.num_tokens, len(match.steps), match.has_logits) == (16, 1, True)
    assert db.gc().num_expired == 2


def test_what_stands_on_a_span_keeps_it_alive(db, clock):
    put(db, range(16), ttl_s=10.0)
    put(db, range(32), ttl_s=1000.0)
    clock.now += 500
    assert found(db, range(32)) == 32
    put(db, range(10))
    clock.now += 10_000
    assert found(db, range(32)) == 16
    assert db.gc().num_expired == 1


def test_what_has_expired_comes_back_without_being_written(db, clock):
    put(db, range(32), ttl_s=10.0)
    clock.now += 20
    report = put(db, range(32), ttl_s=10.0)
    assert (report.num_spans, report.num_bytes) == (0, 0)
    assert found(db, range(32)) == 32
    clock.now += 20
    assert found(db, range(32)) == 0


def test_a_put_never_shortens(db, clock):
    put(db, range(16))
    put(db, range(16), ttl_s=10.0)
    clock.now += 20
    assert found(db, range(16)) == 16


def test_namespaces_and_handles_have_times_of_their_own(db, clock):
    tenant = Root("aa" * 32, "bb" * 32, "tenant é")
    db.set_ttl(100.0, namespace=tenant.namespace)
    db.set_ttl(10.0)
    assert db.ttls() == {"": 10.0, "tenant é": 100.0}
    put(db, [1])
    put(db, [2], ttl_s=1000.0)
    put(db, [3], ttl_s=math.inf)
    put(db, [1], root=tenant)
    db.ttl_s = 50.0
    put(db, [4])
    put(db, [5], ttl_s=1.0)
    alive = []
    for now in (5, 20, 60, 200, 2000):
        clock.now = 1_000_000.0 + now
        alive.append(([first for first in range(1, 6) if found(db, [first])], found(db, [1], tenant)))
    assert alive == [([1, 2, 3, 4], 1), ([2, 3, 4], 1), ([2, 3], 1), ([2, 3], 0), ([3], 0)]
    db.set_ttl(None)
    db.set_ttl(math.inf, namespace="tenant é")
    assert db.ttls() == {}
    for wrong in (0, -1, "1", math.nan):
        with pytest.raises((StoreError, InputTypeError)):
            db.set_ttl(wrong)
    with pytest.raises(InputTypeError):
        db.set_ttl(1.0, namespace=7)


def test_readers_see_expiry_too(tmp_path, clock):
    with PromptDB(tmp_path / "store", clock=clock) as db:
        put(db, [1], ttl_s=10.0)
    with PromptDB(tmp_path / "store", readonly=True, clock=clock) as db:
        assert found(db, [1]) == 1
        clock.now += 10
        assert found(db, [1]) == 0


# Orphans and leftovers


def test_orphans_are_collected(db):
    put(db, range(64))
    put(db, [1000])
    (node,) = [node for node, record in db.nodes() if record.start == 16]
    db.remove(node, only=True)
    assert db.usage()["num_orphans"] == 1
    dry = db.gc(dry_run=True)
    assert (dry.num_orphans, dry.is_dry_run, db.stat()["num_nodes"]) == (2, True, 4)
    report = db.gc()
    assert (report.num_orphans, report.num_evicted, report.num_expired) == (2, 0, 0)
    assert report.freed_bytes == dry.freed_bytes > 0
    assert db.stat()["num_nodes"] == 2
    assert db.usage()["num_orphans"] == 0


def test_orphans_that_are_found_again_are_kept(db):
    put(db, range(64))
    (node,) = [node for node, record in db.nodes() if record.start == 16]
    db.remove(node, only=True)
    put(db, range(32))
    assert found(db, range(64)) == 64
    assert (db.usage()["num_orphans"], db.gc().num_orphans) == (0, 0)


def test_leftovers_are_collected(db):
    put(db, range(16))
    strange = bytes(range(32))

    def leave(writer):
        writer.put(BLOBS, strange + b"kv", b"x" * 100)
        writer.put(CHILDREN, strange + b"0000", strange + b"1111")

    db._index.transact(leave)
    assert len(db.verify()) == 2
    assert db.gc(dry_run=True).num_leftovers == 2
    assert db.gc().num_leftovers == 2
    assert found(db, range(16)) == 16


def test_collecting_is_refused_to_readers(tmp_path):
    with PromptDB(tmp_path / "store") as db:
        put(db, [1])
    with PromptDB(tmp_path / "store", readonly=True) as db:
        for write in (
            db.gc,
            db.compact,
            lambda: db.gc(dry_run=True),
            lambda: db.set_quota(1),
            lambda: db.set_ttl(1.0),
            lambda: db.pin(ROOT, [1]),
            lambda: db.tag("t", ROOT, [1]),
            lambda: db.unpin(name=""),
        ):
            with pytest.raises(ReadOnlyStoreError):
                write()
    with pytest.raises(StoreError), PromptDB.in_memory() as db:
        db.gc(-1)


# Last use


@pytest.fixture
def transactions(db, monkeypatch):
    counted, transact = [], db._index.transact
    monkeypatch.setattr(db._index, "transact", lambda *args, **options: counted.append(1) or transact(*args, **options))
    return counted


def test_lookups_write_nothing(db, clock, transactions):
    put(db, range(64))
    transactions.clear()
    for _ in range(1000):
        clock.now += 100
        found(db, range(64))
    assert transactions == []
    put(db, [1])
    assert len(transactions) == 1
    assert {life.used_unix_s for life in lives(db).values()} == {clock.now}


def test_uses_that_pile_up_are_written(db, clock, transactions, monkeypatch):
    monkeypatch.setattr("promptdb.access.MANY_PENDING", 2)
    put(db, range(64))
    transactions.clear()
    clock.now += 100
    found(db, range(30))
    assert transactions == []
    with db.read() as snapshot:
        snapshot.match(ROOT, pack_tokens(range(64)))
    assert transactions == [1]
    assert {life.used_unix_s for life in lives(db).values()} == {clock.now}


def test_uses_are_written_by_close_and_not_by_readers(tmp_path, clock):
    path = tmp_path / "store"
    with PromptDB(path, clock=clock) as db:
        put(db, [1])
    clock.now += 100
    with PromptDB(path, readonly=True, clock=clock) as db:
        found(db, [1])
        db.flush_accesses()
    with PromptDB(path, clock=clock) as db:
        assert [life.used_unix_s for life in lives(db).values()] == [clock.now - 100]
        found(db, [1])
    with PromptDB(path, clock=clock) as db:
        assert [life.used_unix_s for life in lives(db).values()] == [clock.now]


def test_uses_never_make_anything_fail(tmp_path, clock):
    db = PromptDB(tmp_path / "store", clock=clock)
    put(db, [1])
    clock.now += 100
    found(db, [1])
    with db.read():
        db.flush_accesses()  # it cannot write now
    db._index.close()
    found_again = PromptDB(tmp_path / "store", clock=clock)
    db.close()
    assert found(found_again, [1]) == 1
    found_again.close()


def test_the_log_is_bounded(monkeypatch):
    monkeypatch.setattr("promptdb.access.MAX_PENDING", 10)
    log = AccessLog()
    for number in range(100):
        log.touch(number.to_bytes(32, "big"), 1.0)
    assert len(log.take(1000)) == 10
    assert log.take(1000) == {}


# Damage


@pytest.mark.parametrize("table", [LIFE, QUEUE, LABELS, META])
@pytest.mark.parametrize("change", ["flip", "delete"])
def test_damage_of_the_accounting_is_named_and_repaired(db, table, change):
    db.set_quota(10**6, policy="lru")
    put(db, range(40), ttl_s=1000.0)
    db.pin(ROOT, range(20), name="p")
    db.tag("t", ROOT, range(40))

    def damage(writer):
        key = USAGE_KEY if table == META else next(writer.scan(table))[0]
        value = bytearray(writer.get(table, key))
        writer.delete(table, key)
        if change == "flip" and value:
            value[-1] ^= 1
            writer.put(table, key, value)
        return key

    key = db._index.transact(damage)
    problems = db.verify()
    named = {(problem.table, problem.key) for problem in problems}
    if (table, change) == (LABELS, "delete"):
        assert {name for name, _ in named} == {LIFE, META}  # a pin that is gone is missed by what it held
    else:
        assert (table, key.hex()) in named
    assert db.verify(fix=True) == problems
    assert db.verify() == []
    assert found(db, range(40)) == 40
    assert db.limits().quota_bytes == 10**6
    put(db, range(60))
    db.gc(0)


def test_a_label_of_no_kind(db):
    put(db, [1])
    node, _ = next(db.nodes())
    label = Label("tag", node, "x", 1, 1.0, math.inf)
    db._index.transact(lambda writer: label.write(writer))
    assert label_key("tag", node, "x") == b"t" + node + b"x"
    strange = b"q" + node
    db._index.transact(lambda writer: writer.put(LABELS, strange, b"not a record"))
    assert [problem.key for problem in db.verify(fix=True)] == [strange.hex()]
    assert [each.name for each in db.tags()] == ["x"]
