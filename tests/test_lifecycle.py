"""Quota, eviction, time to live, pins and collecting: against a plain model, across restarts, processes and kills."""

import copy
import math
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lifecycle_model import LOGITS_BLOB, Model, TooLarge, payload

from promptdb import PromptDB
from promptdb.errors import NodeNotFoundError, QuotaExceededError
from promptdb.format import LIFE
from promptdb.keys import Root, pack_tokens
from promptdb.life import POLICIES, Life
from promptdb.snapshot import Snapshot, Verified
from promptdb.testing import scratch_directory

# Few, and all of one family, so that most of what is looked up, pinned or put again is there, or was.
BASES = ["00100110", "00110", "0010111011", "1"]
PROMPTS = st.builds(lambda base, length: tuple(map(int, base[:length])), st.sampled_from(BASES), st.integers(1, 10))
ROOT, TENANT = Root("aa" * 32, "bb" * 32), Root("aa" * 32, "bb" * 32, "tenant")
ROOTS = st.sampled_from([ROOT, ROOT, ROOT, TENANT])
PAUSES = st.sampled_from([0.0, 0.0, 0.0, 1.0, 45.0, 70.0, 400.0])
QUOTAS = st.sampled_from([0, 0, 9_000, 30_000, 90_000])
TTLS = st.none() | st.sampled_from([50.0, 500.0, math.inf])
AT = st.integers(min_value=0)


class LifecycleMachine(RuleBasedStateMachine):
    """A store with limits under random work, against the model of it."""

    persistent = True

    def open_store(self, directory: Path, **options) -> PromptDB:
        return PromptDB(directory / "store", map_bytes=1, **options)

    @initialize(chunk=st.sampled_from([2, 4]), quota=QUOTAS, policy=st.sampled_from(POLICIES))
    def create(self, chunk, quota, policy):
        self.directory = scratch_directory()
        self.model = Model(chunk, quota, policy)
        options = {"chunk_tokens": chunk, "quota_bytes": quota, "policy": policy}
        self.db = self.open_store(self.directory, clock=lambda: self.model.now, **options)

    def teardown(self):
        if hasattr(self, "db"):
            self.db.close()
            shutil.rmtree(self.directory)

    def some_node(self, at):
        nodes = sorted(self.model.spans)
        return nodes[at % len(nodes)] if nodes else None

    @rule(
        root=ROOTS,
        tokens=PROMPTS,
        ttl=TTLS,
        compute_s=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
        with_logits=st.booleans(),
        from_start=st.booleans(),
        pause=PAUSES,
    )
    def put(self, root, tokens, ttl, compute_s, with_logits, from_start, pause):
        self.model.now += pause
        if len(self.model.pending) > 16:  # more than a put writes
            self.db.flush_accesses()
            self.model.flush()
        before = copy.deepcopy(self.model)
        logits_at = [len(tokens)] if with_logits and tokens else []
        start = 0 if from_start else self.model.covered(self.model.walk(root, tokens), tokens)
        refused = False
        try:
            self.model.put(root, tokens, ttl, compute_s, logits_at)
        except TooLarge:
            self.model, refused = before, True

        def encode(position):
            cuts = [*range((position // before.chunk + 1) * before.chunk, len(tokens), before.chunk), len(tokens)]
            starts = [position, *cuts[:-1]]
            return [payload(tokens, one, end, compute_s) for one, end in zip(starts, cuts, strict=True) if end > one]

        def store():
            return self.db.put(
                root, pack_tokens(tokens), start, encode, dict.fromkeys(logits_at, LOGITS_BLOB), ttl_s=ttl
            )

        if refused:
            with pytest.raises(QuotaExceededError):
                store()
        else:
            store()

    @rule(root=ROOTS, tokens=PROMPTS, pause=PAUSES)
    def lookup(self, root, tokens, pause):
        self.model.now += pause
        known = {"model": root.weights_id, "tokenizer": root.tokenizer_id, "namespace": root.namespace}
        assert self.db.lookup(tokens, **known).num_tokens == self.model.lookup(root, tokens)

    @rule(root=ROOTS, tokens=PROMPTS, seconds=st.sampled_from([60.0, 600.0]), name=st.sampled_from(["", "é"]))
    def pin(self, root, tokens, seconds, name):
        self.model.lookup(root, tokens)  # a use
        path = self.model.walk(root, tokens)
        alive = [span for number, span in enumerate(path)
                 if all(self.model.ends(each) > self.model.now for each in path[: number + 1])]  # fmt: skip
        if not alive:
            with pytest.raises(NodeNotFoundError):
                self.db.pin(root, tokens, expires_s=seconds, name=name)
            return
        label = self.db.pin(root, tokens, expires_s=seconds, name=name)
        assert (label.node, label.num_tokens) == (alive[-1].node, alive[-1].end)
        self.model.pins[alive[-1].node, name] = self.model.now + seconds

    @rule(name=st.sampled_from(["", "é"]))
    def unpin(self, name):
        doomed = [key for key in self.model.pins if key[1] == name]
        assert self.db.unpin(name=name) == len(doomed)
        for key in doomed:
            del self.model.pins[key]

    @rule(at=AT, only=st.sampled_from([True, True, False]))
    def remove(self, at, only):
        node = self.some_node(at)
        if node is None:
            return
        below = {each for each in self.model.spans if node in self.model.path(each)}
        before = set(self.model.spans)
        self.db.remove(node, only=only)
        gone = before - {each for each, _ in self.db.nodes()}
        assert gone == {node} if only else gone >= (below if node not in self.model.lost() else {node})
        for each in sorted(gone, key=lambda each: -self.model.spans[each].start):
            self.model.remove(each)
        if not only:
            self.model.pins = {key: until for key, until in self.model.pins.items() if key[0] not in gone}

    @rule(goal=st.sampled_from([None, None, 20_000, 0]))
    def collect(self, goal):
        dry = self.db.gc(goal, dry_run=True)
        report = self.db.gc(goal)
        found = (report.num_expired, report.num_orphans, report.num_evicted)
        assert found == self.model.collect(goal)
        assert found == (dry.num_expired, dry.num_orphans, dry.num_evicted)
        assert (report.freed_bytes, report.charged_bytes) == (dry.freed_bytes, dry.charged_bytes)
        assert report.num_leftovers == 0
        assert report.charged_bytes == self.model.charged()

    @rule(quota=QUOTAS, policy=st.none() | st.sampled_from(POLICIES))
    def set_quota(self, quota, policy):
        model = self.model
        model.flush()
        is_new = policy not in (None, model.policy)
        old = (model.quota, model.policy)
        if quota and not is_new:
            model.evict(quota, quota, set())
        before = copy.deepcopy(model)
        model.quota, model.policy = quota, policy or model.policy
        if is_new:
            for span in model.spans.values():
                span.priority = model.rank(span)
        try:
            model.keep_quota(set())
        except TooLarge:
            self.model = before
            assert (before.quota, before.policy) == old
            with pytest.raises(QuotaExceededError):
                self.db.set_quota(quota, policy=policy)
            return
        self.db.set_quota(quota, policy=policy)

    @rule(ttl=TTLS, root=ROOTS)
    def set_ttl(self, ttl, root):
        self.db.set_ttl(ttl, namespace=root.namespace)
        self.model.ttls.pop(root.namespace, None)
        if ttl not in (None, math.inf):
            self.model.ttls[root.namespace] = ttl
        assert self.db.ttls() == self.model.ttls

    @rule()
    def flush(self):
        self.db.flush_accesses()
        self.model.flush()

    @precondition(lambda self: self.persistent)
    @rule()
    def reopen(self):
        self.db.close()
        self.model.flush()
        self.db = self.open_store(self.directory, clock=lambda: self.model.now)

    @invariant()
    def is_as_the_model_says(self):
        if not hasattr(self, "db"):
            return
        model = self.model
        problems = self.db.verify()
        assert problems == [], problems
        usage = self.db.usage()
        assert usage["charged_bytes"] == model.charged()
        assert usage["num_orphans"] == len(model.orphans())
        assert not model.quota or usage["charged_bytes"] <= model.quota
        assert self.db.limits().quota_bytes == model.quota
        for root in (ROOT, TENANT):
            for base in BASES:
                tokens = tuple(map(int, base))
                with self.db._index.read() as reader:  # which is no use
                    found = Snapshot(reader, Verified("once"), None, lambda: model.now).match(root, pack_tokens(tokens))
                pending = dict(model.pending)
                assert found.num_tokens == model.lookup(root, tokens)
                assert found.has_logits == ((root, tokens[: found.num_tokens]) in model.logits)
                model.pending = pending
        with self.db.read() as snapshot:
            lives = {node: Life.unpack(node, data) for node, data in snapshot.reader.scan(LIFE)}
        assert lives.keys() == model.spans.keys()
        for node, span in model.spans.items():
            life = lives[node]
            assert life.parent == span.parent or span.parent not in model.spans
            assert (life.used_unix_s, life.expires_unix_s, life.size_bytes) == (span.used, span.expires, span.size)
            assert life.priority == span.priority
            assert life.pinned_unix_s == model.pinned_until(node)


class MemoryMachine(LifecycleMachine):
    persistent = False

    def open_store(self, directory: Path, **options) -> PromptDB:
        return PromptDB.in_memory(**options)


def walk_at_random(machine, seed, steps):
    """Do the same work as hypothesis, with weights that keep the store full, so that much is evicted and adopted."""
    source = random.Random(seed)

    def prompt():
        return {"root": source.choice([ROOT, ROOT, ROOT, TENANT]), "tokens": tokens()}

    def tokens():
        return tuple(map(int, source.choice(BASES)[: source.randint(1, 10)]))

    def pause():
        return source.choice([0.0, 0.0, 1.0, 45.0, 70.0, 400.0])

    work = {
        "put": (14, lambda: {
            **prompt(), "ttl": source.choice([None, None, None, 50.0, 500.0]), "pause": pause(),
            "compute_s": source.choice([0.0, 0.01, 1.0, 30.0]), "with_logits": source.random() < 0.4,
            "from_start": source.random() < 0.5,
        }),
        "lookup": (6, lambda: {**prompt(), "pause": pause()}),
        "pin": (2, lambda: {**prompt(), "seconds": source.choice([60.0, 600.0]), "name": source.choice(["", "é"])}),
        "unpin": (1, lambda: {"name": source.choice(["", "é"])}),
        "remove": (5, lambda: {"at": source.randrange(1000), "only": source.random() < 0.8}),
        "collect": (1, lambda: {"goal": source.choice([None, None, 30_000])}),
        "set_quota": (1, lambda: {"quota": source.choice([0, 20_000, 40_000, 90_000]), "policy":
                                  source.choice([None, "cost", "lru", "fifo"])}),
        "set_ttl": (1, lambda: {"ttl": source.choice([None, None, 500.0]), "root": source.choice([ROOT, TENANT])}),
        "flush": (1, dict),
        "reopen": (1 if machine.persistent else 0, dict),
    }  # fmt: skip
    machine.create(source.choice([2, 4]), source.choice([20_000, 40_000]), source.choice(["cost", "lru", "fifo"]))
    weights = [weight for weight, _ in work.values()]
    try:
        for _ in range(steps):
            (name,) = source.choices(list(work), weights)
            getattr(machine, name)(**work[name][1]())
            machine.is_as_the_model_says()
    finally:
        machine.teardown()


@pytest.mark.parametrize("seed", range(12))
def test_long_walk_in_memory(seed):
    walk_at_random(MemoryMachine(), seed, 150)


@pytest.mark.parametrize("seed", range(3))
def test_long_walk_on_disk(seed):
    walk_at_random(LifecycleMachine(), seed, 100)


slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]
TestInMemory = MemoryMachine.TestCase
TestInMemory.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=slow)
TestOnDisk = LifecycleMachine.TestCase
TestOnDisk.settings = settings(max_examples=10, stateful_step_count=30, deadline=None, suppress_health_check=slow)
