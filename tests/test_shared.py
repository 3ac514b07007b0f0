"""The shared tier: two stores that fill each other, what is believed of the far side, and what a failure costs."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
from archive_tools import MODEL, ROOT, TOKENIZER, check_content, lookup, num_logits, put
from blake3 import blake3
from far_servers import needs_redis, redis_server
from shared_tools import PROMPT, WAIT_S, Machine

from promptdb import far_redis
from promptdb.archive import Selection
from promptdb.db import PromptDB
from promptdb.errors import InputTypeError, ReadOnlyStoreError, SharedError
from promptdb.far import joined
from promptdb.far_index import Entry, Walk, value_key
from promptdb.format import BlobEntry, checksum, pack_record
from promptdb.keys import Root, pack_tokens
from promptdb.outbox import waiting
from promptdb.parcel import load_parcel
from promptdb.pulling import Want
from promptdb.shared import connect
from promptdb.shared_options import SharedOptions, store_url
from promptdb.shared_sync import pull, push
from promptdb.signing import write_key

# Two machines


def test_what_one_machine_puts_another_finds(machine):
    one, two = machine("one"), machine("two")
    one.put(PROMPT, logits=[20, 50])
    assert lookup(two.db, PROMPT).num_tokens == 0
    assert two.pull(PROMPT) == 50
    assert lookup(two.db, PROMPT).is_complete
    assert num_logits(two.db) == 2
    assert (two.counts.hits, two.counts.tokens_fetched, two.counts.round_trips) == (1, 50, 1)


def test_they_fill_each_other(machine):
    one, two = machine("one"), machine("two")
    one.put(PROMPT[:30])
    assert two.pull(PROMPT) == 30
    two.put(PROMPT, logits=[50])
    assert one.pull([*PROMPT, 7]) == 50
    assert one.counts.tokens_fetched == 20


def test_what_came_from_there_does_not_go_back(machine):
    one, two = machine("one"), machine("two")
    one.put(PROMPT, logits=[50])
    two.pull(PROMPT)
    assert two.tier.num_waiting() == 0
    assert two.counts.spans_sent == 0


@pytest.mark.parametrize("seed", range(8))
def test_any_cuts_on_any_machine(machine, seed):
    """Prompts that share prefixes of any length, cut anywhere, put here and there: everybody finds the longest."""
    rng = random.Random(seed)
    machines = [machine("a", chunk_tokens=rng.choice([4, 16])), machine("b", chunk_tokens=16)]
    prompts = []
    for _ in range(8):
        base = rng.choice(prompts)[: rng.randrange(1, 40)] if prompts and rng.random() < 0.8 else []
        prompts.append(base + [rng.randrange(3) for _ in range(rng.randrange(1, 30))])
    for tokens in prompts:
        inner = sorted(rng.sample(range(1, len(tokens)), min(2, len(tokens) - 1)))
        each = rng.choice(machines)
        each.pull(tokens, boundaries=inner)
        each.put(tokens, boundaries=inner, logits=[len(tokens)])
    third = machine("c")
    for tokens in rng.sample(prompts, len(prompts)):
        assert third.pull(tokens) == len(tokens)
        assert lookup(third.db, tokens).is_complete
    assert third.counts.rejected == third.counts.lost == 0


def test_other_identities_find_nothing(machine):
    one, two = machine("one"), machine("two")
    one.put(PROMPT)
    for root in (Root(MODEL, TOKENIZER, "tenant"), Root("dd" * 32, TOKENIZER), Root(MODEL, TOKENIZER, "", "ee" * 32)):
        two.tier.pull(root, [Want(pack_tokens(PROMPT))])
    assert two.counts.hits == 0
    assert two.db.stat()["num_nodes"] == 0


def test_a_part_of_a_span_is_found(machine):
    one, two = machine("one", chunk_tokens=256), machine("two", chunk_tokens=256)
    one.put(PROMPT)
    assert two.pull([*PROMPT[:20], 1, 2, 3]) == 20


def test_a_span_that_began_before_what_is_here(machine):
    one, two = machine("one", chunk_tokens=256), machine("two", chunk_tokens=256)
    put(two.db, PROMPT[:10])
    two.db.shared = None  # it does not share that
    one.put(PROMPT)
    assert two.pull(PROMPT) == 50


def test_logits_that_came_later(machine):
    """Logits in the middle of a span that lies there already are sent by themselves, and found."""
    one, two = machine("one"), machine("two")
    one.put(PROMPT, logits=[50])
    one.put(PROMPT[:40], logits=[40])
    assert len(one.keys("l/")) == 1
    assert two.pull(PROMPT[:40]) == 40
    assert lookup(two.db, PROMPT[:40]).is_complete
    two.pull(PROMPT)
    assert lookup(two.db, PROMPT).is_complete


def test_two_writers_at_once(machine):
    """Both send the same: one value each at most, one entry, and the second notices."""
    one, two = machine("one"), machine("two")
    put(one.db, PROMPT, logits=[50])
    put(two.db, PROMPT, logits=[50])
    assert one.tier.flush(WAIT_S)
    assert two.tier.flush(WAIT_S)
    assert len(one.keys()) == 4
    assert one.counts.spans_sent + two.counts.spans_sent == 4


def test_everything_is_sent_whatever_the_cuts(machine):
    """What lies there in part is completed, not repeated."""
    one, two = machine("one"), machine("two", chunk_tokens=256)
    one.put(PROMPT[:20])
    two.put(PROMPT)
    entries = machine("three").entries()
    assert sum(entry.num_tokens for entry in entries.values()) == 50
    assert machine("three").pull(PROMPT) == 50


# How it is asked for


def test_round_trips(machine):
    """Where spans end at positions that can be guessed, one question is enough; else one more for each."""
    one, two, three = machine("one"), machine("two"), machine("three")
    one.far.first_batch = two.far.first_batch = three.far.first_batch = 4096
    one.put(list(range(1000)))
    assert two.pull(list(range(1000))) == 1000
    assert two.counts.round_trips == 1
    other = [5, *range(1000)]
    one.put(other, boundaries=[7, 100, 333])
    assert two.pull(other, boundaries=[7, 100, 333]) == 1001
    assert two.counts.round_trips == 2
    assert three.pull(other) == 1001
    assert three.counts.round_trips == 4
    assert three.pull(list(range(2000, 2500))) == 0
    assert three.counts.round_trips == 5


def test_objects_are_asked_a_few_at_a_time(machine):
    """Where every question costs, a lookup starts with a few, and goes on while they are answered."""
    one, two = machine("one", chunk_tokens=4), machine("two", chunk_tokens=4)
    one.put(list(range(400)))
    asked = []
    get = two.far.get
    two.far.get = lambda keys, sizes=None: asked.append(len(keys)) or get(keys, sizes)
    assert two.pull(list(range(400))) == 400
    lookups = [number for number in asked if number > 1]
    assert lookups == [17, 32, 52]
    asked.clear()
    assert two.pull(list(range(1, 400))) == 0
    assert asked == [17]


def test_many_prompts_in_one_question(machine):
    one, two = machine("one"), machine("two")
    prompts = [[*range(40), number] for number in range(20)]
    for prompt in prompts:
        put(one.db, prompt)
    assert one.tier.flush(WAIT_S)
    two.far.first_batch = 4096
    two.tier.pull(ROOT, [Want(pack_tokens(prompt)) for prompt in prompts])
    assert all(check_content(two.db, prompt) == 41 for prompt in prompts)
    assert two.counts.round_trips <= 2
    assert two.counts.tokens_fetched == 60


def test_what_is_computed_sooner_is_not_fetched(machine):
    one, two = machine("one"), machine("two")
    one.put(PROMPT)
    two.tier.calls.bytes_per_s = 1000.0
    assert two.pull(PROMPT, rate=1e6) == 0
    assert two.counts.skipped == 1
    two.tier.calls.bytes_per_s = 1e12
    assert two.pull(PROMPT, rate=1000.0) == 50
    two.tier.calls.round_trip_s = 10.0
    asked = two.counts.round_trips
    two.pull([*PROMPT, 1], rate=1000.0)
    assert two.counts.round_trips == asked


def test_a_walk_asks_no_more_than_it_must():
    """Positions before what is here count only if a span that begins there may go on beyond it."""
    packed = pack_tokens(range(100))
    assert len(Walk(ROOT, packed, 0, (), 16).ask(1000)) == 7
    assert len(Walk(ROOT, packed, 64, (), 16).ask(1000)) == 4
    assert len(Walk(ROOT, packed, 70, (75,), 16).ask(1000)) == 5
    assert Walk(ROOT, packed, 100, (), 16).ask(1000) == []


# What is believed


def spoil(far, key, change):
    """Put other bytes under a key."""
    (pieces,) = far.get([key])
    value = change(bytearray(joined(pieces)))
    far.delete([key])
    far.put([(key, value)])


def flip(at):
    def change(value):
        value[at] ^= 1
        return value

    return change


@pytest.mark.parametrize("at", [0, 40, 700, 1500, -1])
def test_a_changed_byte_is_noticed(machine, at):
    one, two = machine("one"), machine("two")
    one.put(PROMPT, logits=[16])
    first = next(entry for entry in one.entries().values() if entry.start == 0)
    spoil(one.far, value_key(first.value), flip(at))
    assert two.pull(PROMPT) == 0
    assert two.counts.rejected == 1
    # What did not hold is taken out, so that it can be put again.
    one.put([*PROMPT[:16], 9])
    assert one.tier.pusher.push([]) is not None


@pytest.mark.parametrize("change", [lambda value: value[:-1], lambda value: value[:100], lambda value: value + b"x"])
def test_a_cut_off_value_is_noticed(machine, change):
    one, two = machine("one"), machine("two")
    one.put(PROMPT)
    first = next(entry for entry in one.entries().values() if entry.start == 0)
    spoil(one.far, value_key(first.value), change)
    assert two.pull(PROMPT) == 0
    assert two.counts.rejected == 1


def forge(far, key, entry, value):
    """Put a value, and an entry that names it, in the place of another."""
    digest = blake3(value).digest()
    far.put([(value_key(digest), value)])
    far.delete([key])
    forged = Entry(entry.node, entry.start, entry.span, entry.logits, digest, len(value))
    far.put([(key, forged.pack(key))])


def test_swapped_values_are_noticed(machine):
    """A value that holds, of another prompt, namespace, or place, in the place of the one that was asked for."""
    one, two = machine("one"), machine("two")
    tenant = Root(MODEL, TOKENIZER, "tenant")
    one.put(PROMPT)
    put(one.db, PROMPT, root=tenant)
    one.put([1, *PROMPT])
    entries = one.entries()
    node = lookup(one.db, PROMPT).steps[0].node
    (key, target) = next((key, each) for key, each in entries.items() if each.node == node)
    others = [entry for other, entry in entries.items() if other != key]
    assert len(others) > 8
    for other in others:
        (pieces,) = one.far.get([value_key(other.value)])
        forge(one.far, key, target, joined(pieces))
        assert two.pull(PROMPT) == 0
        assert two.db.stat()["num_nodes"] == 0
    assert two.counts.rejected >= len(others)


def test_forged_content_is_noticed(machine):
    """An attacker who makes digests right: NaN in keys, other layouts, too much or too little in the archive."""
    one, two = machine("one"), machine("two")
    one.put(PROMPT[:16], logits=[16])
    ((key, entry),) = one.entries().items()
    parcel = load_parcel(one.db, entry.node)
    good = bytes(parcel.pack())
    kv = bytearray(parcel.blobs["kv"])
    kv[-4:] = b"\xff\xff\xff\x7f"
    entries = dict(parcel.record.blobs)
    entries["kv"] = BlobEntry(len(kv), checksum(parcel.node + b"kv", kv))
    nan = replace(parcel, record=parcel.record._replace(blobs=entries), blobs={**parcel.blobs, "kv": kv})
    for value in (bytes(nan.pack()), b"\0", b"not an archive at all", good[:1000]):
        forge(one.far, key, entry, value)
        assert two.pull(PROMPT[:16]) == 0
        assert two.db.stat()["num_nodes"] == 0
    assert two.counts.rejected == 4
    # As of an archive: what came before the damage was checked, and is the span itself.
    for name, value in (("three", good + b"more"), ("four", good[:-1])):
        forge(one.far, key, entry, value)
        assert machine(name).pull(PROMPT[:16]) == 16
    forge(one.far, key, entry, good)
    assert two.pull(PROMPT[:16]) == 16


def test_entries_that_cannot_be_are_ignored(machine):
    one, two = machine("one"), machine("two")
    one.put(PROMPT)
    key = next(key for key, entry in one.entries().items() if entry.start == 0)
    entry = one.entries()[key]
    for forged in (
        b"",
        b"x" * 100,
        Entry(entry.node, 5, entry.span, (), entry.value, entry.size_bytes).pack(key),
        Entry(entry.node, 0, entry.span[:-4], (), entry.value, entry.size_bytes).pack(key),
        Entry(b"n" * 32, 0, entry.span, (), entry.value, entry.size_bytes).pack(key),
        Entry(entry.node, 0, entry.span, (), entry.value, 1 << 60).pack(key),
        Entry(entry.node, 0, entry.span, (99,), entry.value, entry.size_bytes).pack(key),
        Entry(entry.node, 0, entry.span, (), b"v" * 32, entry.size_bytes).pack(key),
    ):
        one.far.delete([key])
        one.far.put([(key, forged)])
        assert two.pull(PROMPT) == 0
        assert two.db.stat()["num_nodes"] == 0


def test_a_lost_value_is_a_miss_and_is_put_again(machine):
    one, two = machine("one"), machine("two")
    one.put(PROMPT)
    entries = one.entries()
    middle = next(entry for entry in entries.values() if entry.start == 16)
    one.far.delete([value_key(middle.value)])
    assert two.pull(PROMPT) == 16
    assert two.counts.lost == 1
    two.put(PROMPT)  # computed, and sent
    assert machine("three").pull(PROMPT) == 50


# Signatures


@pytest.fixture
def keys(tmp_path):
    """Return paths: two private keys, and a list that trusts the first only."""
    first, second, trust = (str(tmp_path / name) for name in ("first.pem", "second.pem", "trusted"))
    public = write_key(first)
    write_key(second)
    (tmp_path / "trusted").write_text(f"# who may fill our store\n{public}  # the first\n")
    return first, second, trust


def test_only_signed_values_are_used(machine, keys):
    first, second, trust = keys
    signer, stranger, nobody = machine("a", sign_with=first), machine("b", sign_with=second), machine("c")
    reader, careless = machine("d", trust=trust), machine("e")
    signer.put(PROMPT)
    stranger.put([1, *PROMPT])
    nobody.put([2, *PROMPT])
    assert reader.pull(PROMPT) == 50
    assert reader.pull([1, *PROMPT]) == reader.pull([2, *PROMPT]) == 0
    assert reader.counts.rejected == 8
    assert careless.pull([1, *PROMPT]) == careless.pull([2, *PROMPT]) == 51
    # Others' entries are theirs: they are not taken out.
    assert machine("f").pull([2, *PROMPT]) == 51


def test_a_signature_holds_for_its_place_only(machine, keys):
    first, _, trust = keys
    signer, reader = machine("a", sign_with=first), machine("b", trust=trust)
    signer.put(PROMPT)
    entries = signer.entries()
    key, entry = next((key, entry) for key, entry in entries.items() if entry.start == 0)
    others = [{"signature": other.signature} for other in entries.values() if other is not entry]
    for change in (*others, {"value": b"v" * 32}, {"size_bytes": 7}, {"node": b"n" * 32}, {"public_key": b"k" * 32}):
        signer.far.delete([key])
        signer.far.put([(key, Entry(**{**vars(entry), **change}).pack(key))])
        assert reader.pull(PROMPT) == 0
    signer.far.delete([key])
    signer.far.put([(key, entry.pack(key))])
    assert reader.pull(PROMPT) == 50


def test_keys_that_cannot_be_used(machine, keys, tmp_path):
    first, _, trust = keys
    (tmp_path / "first.pem").chmod(0o644)
    with pytest.raises(SharedError, match="read by others"):
        machine("a", sign_with=first)
    with pytest.raises(SharedError, match="cannot be written"):
        write_key(first)
    for content, reason in (("", "nobody"), ("zz\n", "line 1"), ("aa\n", "line 1")):
        (tmp_path / "trusted").write_text(content)
        with pytest.raises(SharedError, match=reason):
            machine("a", trust=trust)
    (tmp_path / "nokey").write_bytes(b"x")
    (tmp_path / "nokey").chmod(0o600)
    with pytest.raises(SharedError, match="cannot be read"):
        machine("a", sign_with=str(tmp_path / "nokey"))


# The queue, and the settings


def test_the_queue_survives(tmp_path):
    """What was put while nobody could send waits in the store, and goes when it is opened again."""
    url = f"file://{tmp_path}/far"
    with PromptDB(tmp_path / "one", chunk_tokens=16, shared=url) as db:
        put(db, PROMPT, logits=[50])  # no engine, no tier: nothing is sent
        with db.read() as snapshot:
            assert len(waiting(snapshot.reader, 100)) == 4
    one = Machine(tmp_path / "one", url)
    assert one.tier.flush(WAIT_S)
    two = Machine(tmp_path / "two", url)
    assert two.pull(PROMPT) == 50
    one.db.close()
    two.db.close()


def test_what_is_gone_is_not_sent(machine, tmp_path):
    with PromptDB(tmp_path / "one", chunk_tokens=16, shared=f"file://{tmp_path}/far") as db:
        put(db, PROMPT)
        first = lookup(db, PROMPT).steps[0].node
        db.remove(first)
    one = machine("one")
    assert one.tier.flush(WAIT_S)
    assert one.keys() == []


def test_a_reader_sends_nothing(machine, tmp_path):
    one = machine("one", readonly=True)
    put(one.db, PROMPT)
    assert one.tier.num_waiting() == 0
    one.db.close()
    assert not (tmp_path / "far" / "i").exists()


def test_where_the_url_comes_from(tmp_path, monkeypatch):
    url = f"file://{tmp_path}/far"
    with PromptDB(tmp_path / "db") as db:
        assert db.shared is None
        assert connect(db) is None
        db._index.transact(lambda writer: store_url(writer, url))
    with PromptDB(tmp_path / "db") as db:
        assert db.shared.url == url
    with PromptDB(tmp_path / "db", shared="none") as db:
        assert db.shared is None
    monkeypatch.setenv("PROMPTDB_SHARED", url + "2?timeout_s=3&ttl_s=60&concurrency=2&readonly=1")
    with PromptDB(tmp_path / "db") as db:
        options = db.shared
        assert (options.url, options.timeout_s, options.ttl_s) == (url + "2", 3.0, 60.0)
        assert (options.concurrency, options.readonly) == (2, True)
    with PromptDB(tmp_path / "db", shared=url, readonly=True) as db:
        assert db.shared is None
        with pytest.raises(ReadOnlyStoreError):
            put(db, PROMPT)


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("ftp://host", SharedError),
        ("/a/directory", SharedError),
        (7, InputTypeError),
        ("redis://h?timeout_s=soon", SharedError),
        ("redis://h?timeout_s=-1", SharedError),
        ("redis://h?concurrency=0", SharedError),
    ],
)
def test_urls_that_cannot_be_used(tmp_path, url, error):
    with pytest.raises(error):
        PromptDB(tmp_path / "db", shared=url)
    with PromptDB(tmp_path / "db") as db:  # it was closed again
        assert db.shared is None


def test_a_password_is_not_stored_nor_shown(tmp_path):
    with PromptDB(tmp_path / "db") as db:
        with pytest.raises(SharedError, match="password"):
            db._index.transact(lambda writer: store_url(writer, "redis://team:secret@host"))
        db.shared = SharedOptions("redis://team:secret@host:1/?ssl_keyfile=x")
        tier = connect(db)
        assert "secret" not in str(tier.status())
        assert tier.status()["url"] == "redis://team@host:1/"


# Redis


@needs_redis()
class TestRedis:
    @pytest.fixture
    def server(self, tmp_path):
        with redis_server(tmp_path / "redis", maxmemory="200mb", maxmemory_policy="allkeys-lru") as server:
            yield server

    def test_round_trips(self, machine, server):
        """Counted by the server: a prompt of any length takes one question, and one more for each value."""
        one, two = machine("one", url=server.url), machine("two", url=server.url)
        one.put(list(range(1000)))
        assert two.pull(list(range(1000))) == 1000
        assert two.counts.round_trips == 1

    def test_a_part_that_was_evicted_is_a_miss(self, machine, server):
        """Half a value is none, and is put again."""
        one, two = machine("one", url=server.url), machine("two", url=server.url)
        before = far_redis.INLINE_BYTES, far_redis.PART_BYTES
        far_redis.INLINE_BYTES, far_redis.PART_BYTES = 100, 1000
        try:
            one.put(PROMPT)
            parts = server.cli("keys", "promptdb:v/*#1").split()
            assert len(parts) == 4
            first = next(entry for entry in one.entries().values() if entry.start == 0)
            server.cli("del", f"promptdb:{value_key(first.value)}#1")
            assert one.far.exists([value_key(first.value)]) == [False]
            assert two.pull(PROMPT) == 0
            assert two.counts.lost == 1
            two.put(PROMPT)
            assert machine("three", url=server.url).pull(PROMPT) == 50
        finally:
            far_redis.INLINE_BYTES, far_redis.PART_BYTES = before

    def test_time_to_live(self, machine, server):
        one = machine("one", url=server.url, ttl_s=100)
        one.put(PROMPT)
        names = server.cli("keys", "*").split()
        assert names
        assert all(0 < int(server.cli("ttl", name)) <= 100 for name in names)

    def test_what_is_stood_on_is_kept_in_use(self, machine, server):
        """A machine that has the start of a prompt tells that it uses it, when it fetches what goes on from there."""
        one, two = machine("one", url=server.url), machine("two", url=server.url)
        one.put(list(range(96)))
        assert two.pull(list(range(96))) == 96
        one.put(list(range(128)))
        time.sleep(2.1)  # the server counts idle time in seconds
        names = [name for name in server.cli("keys", "promptdb:[iv]/*").split() if name]

        def idle() -> list[int]:
            return [int(server.cli("object", "idletime", name)) for name in names]

        assert max(idle()) >= 2
        assert two.pull(list(range(128))) == 128
        ends = time.monotonic() + WAIT_S
        while max(idle()) > 1 and time.monotonic() < ends:
            time.sleep(0.05)
        assert len(names) == 16
        assert max(idle()) < 2


# Tags


def test_tags_are_checked(machine, keys):
    """A tag of another prompt than its key says, and one that nobody trusted has signed, are not used."""
    first, second, trust = keys
    signer, stranger, reader = (
        machine("a", sign_with=first),
        machine("b", sign_with=second),
        machine("c", trust=trust),
    )
    for each, tokens in ((signer, PROMPT), (stranger, [1, *PROMPT])):
        each.put(tokens)
        each.db.tag("chosen", ROOT, pack_tokens(tokens))
        assert push(each.db, each.tier, Selection(tag="chosen")).num_present == 4
    assert len(signer.keys("t/")) == 2
    assert pull(reader.db, reader.tier, tag="chosen").num_rejected == 1
    assert [label.num_tokens for label in reader.db.tags("chosen")] == [50]
    assert check_content(reader.db, PROMPT) == 50
    assert check_content(reader.db, [1, *PROMPT]) == 0
    for key in signer.keys("t/"):
        signer.far.delete([key])
        content = {"name": "chosen", "root": ROOT.digest, "tokens": pack_tokens([5, 5])}
        signer.far.put([(key, pack_record(bytes.fromhex(key.rpartition("/")[2]), content))])
    signer.far.put([(signer.keys("t/")[0][:-1] + "0", b"garbage")])
    careless = machine("d")
    assert pull(careless.db, careless.tier, tag="chosen").num_rejected == 3
    assert careless.db.tags("chosen") == []
