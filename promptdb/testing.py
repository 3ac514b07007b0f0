"""Tests for whoever writes a :class:`promptdb.tables.Index`, and for promptdb itself. Needs pytest and hypothesis.

Two suites, each used by subclassing::

    class TestMyIndex(IndexContract):                # the tables: order, snapshots, transactions
        def open_index(self, directory):
            return MyIndex(directory)

    class MyStoreMachine(StoreMachine):              # the database on top, against a list of prompts
        def open_store(self, directory, chunk_tokens):
            return PromptDB(directory / "store", chunk_tokens=chunk_tokens)

    TestMyStore = MyStoreMachine.TestCase

``pytest.register_assert_rewrite("promptdb.testing")`` in a ``conftest.py`` makes failures tell what differs.

The oracles are a dict and a list: they know nothing of trees, cuts or transactions.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import SpanPayload
from promptdb.db import PromptDB
from promptdb.errors import StoreError
from promptdb.format import BLOBS, CHILDREN, LABELS, META, NODES, QUEUE, Group
from promptdb.keys import Root, pack_tokens, unpack_tokens
from promptdb.tables import MAX_KEY_BYTES, Index, Item, Reader, Writer
from promptdb.trie import cut

__all__ = ["IndexContract", "StoreMachine", "encode_tokens", "scratch_directory"]

_TIMEOUT_S = 30.0


def scratch_directory() -> Path:
    """Return a new directory, in memory where the system has one: tests commit thousands of times."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="promptdb-test-", dir=memory if memory.is_dir() else None))


def encode_tokens(
    packed: bytes, boundaries: Sequence[int] = (), chunk_tokens: int = 256
) -> Callable[[int], list[SpanPayload]]:
    """Return an ``encode`` for :meth:`PromptDB.put` whose blobs hold the tokens themselves, so that one can check them.

    Each span gets one blob, ``"tokens"``, with a tensor ``tokens``, U32 ``[num_tokens]``.
    """
    tokens = unpack_tokens(packed)

    def encode(position: int) -> list[SpanPayload]:
        spans = []
        for start, end in cut(position, len(tokens), boundaries, chunk_tokens):
            blob = build_blob([(TensorSpec("tokens", "U32", (end - start,)), packed[4 * start : 4 * end])])
            layout = (Group((0, 1), 1, 1, "U32"),)
            spans.append(SpanPayload(start, end, layout, {"tokens": blob}, 0.25, {"by": "promptdb.testing"}))
        return spans

    return encode


class IndexContract:
    """What every index must do. Subclass it, name the class ``Test...``, and say how an index is opened."""

    persistent = True
    """Whether what was written is there again after ``close`` and another ``open_index``."""

    @abstractmethod
    def open_index(self, directory: Path) -> Index:
        """Return an open index; the same one, if ``persistent``, each time it is called with the same directory."""

    @pytest.fixture
    def index(self) -> Iterator[Index]:
        """Yield an empty index."""
        directory = scratch_directory()
        index = self.open_index(directory)
        yield index
        index.close()
        shutil.rmtree(directory)

    def test_missing(self, index: Index) -> None:
        """Nothing is found in an empty table."""
        with index.read() as reader:
            assert reader.get(NODES, b"key") is None
            assert list(reader.scan(NODES)) == []
            assert reader.count(NODES) == 0

    def test_put_replace_delete(self, index: Index) -> None:
        """A writer sees its own writes, and so does whoever reads after it."""

        def work(writer: Writer) -> str:
            writer.put(NODES, b"a", b"1")
            writer.put(NODES, b"b", bytearray(b"2"))
            writer.put(NODES, b"c", memoryview(b"3"))
            writer.put(NODES, b"a", b"one")
            assert _bytes(writer.get(NODES, b"a")) == b"one"
            assert writer.count(NODES) == 3
            assert writer.delete(NODES, b"b") is True
            assert writer.delete(NODES, b"b") is False
            assert writer.get(NODES, b"b") is None
            return "result"

        assert index.transact(work) == "result"
        with index.read() as reader:
            assert _items(reader.scan(NODES)) == [(b"a", b"one"), (b"c", b"3")]
            assert reader.count(NODES) == 2

    def test_tables_are_apart(self, index: Index) -> None:
        """The same key in two tables is two keys."""
        index.transact(lambda writer: writer.put(NODES, b"k", b"node"))
        index.transact(lambda writer: writer.put(BLOBS, b"k", b"blob"))
        with index.read() as reader:
            assert _bytes(reader.get(NODES, b"k")) == b"node"
            assert _bytes(reader.get(BLOBS, b"k")) == b"blob"
            assert reader.get(META, b"k") is None

    def test_extreme_keys_and_values(self, index: Index) -> None:
        """Keys of one byte and of as many as there may be, empty values, and values of megabytes."""
        items = {
            b"\x00": b"",
            b"\xff" * MAX_KEY_BYTES: b"longest key",
            b"\x00" * MAX_KEY_BYTES: b"zeros",
            b"big": bytes(range(256)) * (3 << 12),
        }

        def work(writer: Writer) -> None:
            for key, value in items.items():
                writer.put(BLOBS, key, value)

        index.transact(work)
        with index.read() as reader:
            assert _items(reader.scan(BLOBS)) == sorted(items.items())

    def test_scan(self, index: Index) -> None:
        """Ranges follow the order of unsigned bytes, a prefix before what it starts."""
        keys = [b"\x00", b"a", b"a\x00", b"aa", b"a\x7f", b"a\x80", b"b", b"\xff"]

        def work(writer: Writer) -> None:
            for key in reversed(keys):
                writer.put(CHILDREN, key, b"<" + key)

        index.transact(work)
        with index.read() as reader:
            for probe in [*keys, b"\x00\x00", b"a\x01", b"a\x81", b"c", b"\xff\xff"]:
                assert _items(reader.scan(CHILDREN, probe)) == [(k, b"<" + k) for k in keys if k >= probe]
                within = [k for k in keys if k.startswith(probe)]
                assert _items(reader.scan(CHILDREN, prefix=probe)) == [(k, b"<" + k) for k in within]
                assert list(reader.keys(CHILDREN, probe)) == within
                assert [k for k, _ in reader.scan(CHILDREN, b"a\x01", probe)] == [k for k in within if k >= b"a\x01"]
            assert list(reader.keys(CHILDREN)) == keys

    def test_keys_of_a_store(self, index: Index) -> None:
        """Children of one digest, labels of one span and the queue are scanned one group at a time, in order."""
        digests = [bytes([number]) * 32 for number in (7, 200, 8)]
        tokens = [number.to_bytes(4, "big") for number in (0, 1, 255, 256, 2**32 - 1)]
        names = [b"", b"a", b"a\xc3\xa9", b"n" * 400]
        numbers = [bytes([kind]) + struct.pack(">d", number) for kind in (0, 1) for number in (0.0, 0.5, 7.0, 1e9)]

        def work(writer: Writer) -> None:
            for digest in digests:
                for token in reversed(tokens):
                    writer.put(CHILDREN, digest + token, token)
                for name in reversed(names):
                    writer.put(LABELS, b"p" + digest + name, name)
                    writer.put(LABELS, b"t" + digest + name, name)
            for place, number in enumerate(reversed(numbers)):
                writer.put(QUEUE, number + digests[place % 3], b"")

        index.transact(work)
        with index.read() as reader:
            for digest in digests:
                assert list(reader.keys(CHILDREN, digest)) == [digest + token for token in tokens]
                assert _items(reader.scan(CHILDREN, digest + tokens[1] + b"\0", digest)) == [
                    (digest + token, token) for token in tokens[2:]
                ]
                assert list(reader.keys(LABELS, b"t" + digest)) == [b"t" + digest + name for name in names]
                assert list(reader.keys(LABELS, b"p" + digest + b"a")) == [b"p" + digest + name for name in names[1:3]]
            assert len(list(reader.keys(LABELS, b"p"))) == len(digests) * len(names)
            assert list(reader.keys(LABELS)) == sorted(reader.keys(LABELS))
            assert list(reader.keys(CHILDREN)) == sorted(digest + token for digest in digests for token in tokens)
            assert [key[:9] for key in reader.keys(QUEUE, b"\x01")] == numbers[4:]
            assert [key[:9] for key in reader.keys(QUEUE)] == numbers

    def test_size(self, index: Index) -> None:
        """How long a value is; an empty one is there."""
        index.transact(lambda writer: writer.put(BLOBS, b"empty", b""))
        index.transact(lambda writer: writer.put(BLOBS, b"k", bytes(100_000)))
        with index.read() as reader:
            assert reader.size(BLOBS, b"empty") == 0
            assert reader.size(BLOBS, b"k") == 100_000
            assert reader.size(BLOBS, b"other") is None
            assert reader.size(NODES, b"k") is None

    def test_sizes(self, index: Index) -> None:
        """What an item takes is no less than what was put, and the same for all values of a length."""
        with index.read() as reader:
            key_bytes, value_bytes = reader.stored_sizes(CHILDREN, 36, 1000)
            assert key_bytes >= 36
            assert value_bytes >= 1000
            assert reader.stored_sizes(CHILDREN, 36, 1001) == (key_bytes, value_bytes + 1)

    def test_raising_undoes_everything(self, index: Index) -> None:
        """All of a transaction is there, or nothing."""
        index.transact(lambda writer: writer.put(NODES, b"kept", b"old"))

        def work(writer: Writer) -> None:
            writer.put(NODES, b"kept", b"new")
            writer.put(NODES, b"other", b"x")
            writer.delete(NODES, b"kept")
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            index.transact(work)
        with index.read() as reader:
            assert _items(reader.scan(NODES)) == [(b"kept", b"old")]
        index.transact(lambda writer: writer.put(NODES, b"after", b"1"))

    def test_readers_keep_their_snapshot(self, index: Index) -> None:
        """What is committed beside an open snapshot does not show in it."""
        index.transact(lambda writer: writer.put(NODES, b"k", b"old"))
        started = threading.Event()

        def write() -> None:
            started.set()
            index.transact(lambda writer: writer.put(NODES, b"k", b"new"))

        writing = threading.Thread(target=write)
        with index.read() as reader:
            writing.start()
            assert started.wait(_TIMEOUT_S)
            writing.join(0.05)  # an index whose writers wait for readers is still waiting
            assert _bytes(reader.get(NODES, b"k")) == b"old"
            assert _items(reader.scan(NODES)) == [(b"k", b"old")]
        writing.join(_TIMEOUT_S)
        assert not writing.is_alive()
        with index.read() as reader:
            assert _bytes(reader.get(NODES, b"k")) == b"new"

    def test_reads_nest(self, index: Index) -> None:
        """A thread may hold two snapshots."""
        index.transact(lambda writer: writer.put(NODES, b"k", b"v"))
        with index.read() as outer, index.read() as inner:
            assert _bytes(outer.get(NODES, b"k")) == _bytes(inner.get(NODES, b"k")) == b"v"

    def test_write_inside_read_is_refused(self, index: Index) -> None:
        """It would wait for itself, sometimes: so it is refused always."""
        with index.read(), pytest.raises(StoreError):
            index.transact(lambda writer: writer.put(NODES, b"k", b"v"))
        with pytest.raises(StoreError):
            index.transact(lambda _: index.transact(lambda writer: writer.put(NODES, b"k", b"v")))
        index.transact(lambda writer: writer.put(NODES, b"k", b"v"))

    def test_threads_take_turns(self, index: Index) -> None:
        """No increment of a counter is lost between four threads."""

        def count(writer: Writer) -> None:
            held = writer.get(META, b"counter")
            writer.put(META, b"counter", str(int(bytes(held)) + 1 if held is not None else 1).encode())

        def work() -> None:
            for _ in range(25):
                index.transact(count)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_TIMEOUT_S)
        with index.read() as reader:
            assert _bytes(reader.get(META, b"counter")) == b"100"

    def test_closed_is_refused(self, index: Index) -> None:
        """Closing twice is harmless, closing under a reader is refused, using a closed index is refused."""
        with index.read() as reader:
            with pytest.raises(StoreError):
                index.close()
            assert reader.count(NODES) == 0
        index.close()
        index.close()
        with pytest.raises(StoreError), index.read():
            pass
        with pytest.raises(StoreError):
            index.transact(lambda writer: writer.count(NODES))
        with pytest.raises(StoreError):
            index.stats()

    def test_stats(self, index: Index) -> None:
        """Sizes are there, and grow."""
        before = index.stats()
        index.transact(lambda writer: writer.put(BLOBS, b"k", bytes(1 << 20)))
        after = index.stats()
        assert after["file_bytes"] >= before["file_bytes"] + (1 << 20)
        assert after["map_bytes"] >= after["file_bytes"]

    def test_compact(self, index: Index) -> None:
        """What is stored stays as it is; what the check raises stops it; and the index is used on."""

        def fill(writer: Writer) -> None:
            for number in range(200):
                writer.put(BLOBS, number.to_bytes(2, "big"), bytes([number]) * 10_000)
            for number in range(0, 200, 2):
                writer.delete(BLOBS, number.to_bytes(2, "big"))

        index.transact(fill)
        with index.read() as reader:
            before = _items(reader.scan(BLOBS))
        checked: list[list[tuple[bytes, bytes]]] = []
        index.compact(lambda reader: checked.append(_items(reader.scan(BLOBS))))
        assert checked == [before]
        with index.read() as reader:
            assert _items(reader.scan(BLOBS)) == before
            with pytest.raises(StoreError):
                index.compact(lambda reader: None)
        assert index.stats()["file_bytes"] < 2_000_000

        def refuse(reader: Reader) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            index.compact(refuse)
        index.transact(lambda writer: writer.put(BLOBS, b"after", b"1"))
        with index.read() as reader:
            assert _items(reader.scan(BLOBS)) == [*before, (b"after", b"1")]

    def test_freeing(self, index: Index) -> None:
        """A transaction that says that it frees space is one like any other."""
        index.transact(lambda writer: writer.put(NODES, b"k", b"v"))
        assert index.transact(lambda writer: writer.delete(NODES, b"k"), frees=True) is True
        with pytest.raises(ZeroDivisionError):
            index.transact(lambda writer: _write(writer, [(b"k", b"v")], True), frees=True)
        with index.read() as reader:
            assert reader.count(NODES) == 0

    def test_reopen(self) -> None:
        """What was committed is there again."""
        if not self.persistent:
            pytest.skip("this index does not outlive its handle")
        directory = scratch_directory()
        index = self.open_index(directory)
        index.transact(lambda writer: writer.put(NODES, b"k", b"v" * 100_000))
        index.close()
        index = self.open_index(directory)
        with index.read() as reader:
            assert _bytes(reader.get(NODES, b"k")) == b"v" * 100_000
        index.close()
        shutil.rmtree(directory)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(
        batches=st.lists(
            st.tuples(
                st.booleans(),
                st.lists(st.tuples(st.binary(min_size=1, max_size=3), st.none() | st.binary(max_size=4)), max_size=8),
            ),
            max_size=6,
        ),
        probe=st.binary(min_size=1, max_size=3),
    )
    def test_like_a_dict(self, batches: list[tuple[bool, list[tuple[bytes, bytes | None]]]], probe: bytes) -> None:
        """Any sequence of transactions, some of which fail, leaves what it would leave in a dict."""
        directory = scratch_directory()
        index = self.open_index(directory)
        oracle: dict[bytes, bytes] = {}
        try:
            for fails, writes in batches:
                wanted = dict(oracle)
                for key, value in writes:
                    wanted.pop(key, None)
                    if value is not None:
                        wanted[key] = value
                try:
                    index.transact(lambda writer, writes=writes, fails=fails: _write(writer, writes, fails))  # type: ignore[misc]
                    oracle = wanted
                except ZeroDivisionError:
                    pass
                with index.read() as reader:
                    assert _items(reader.scan(NODES)) == sorted(oracle.items())
                    assert reader.count(NODES) == len(oracle)
                    wanted_items = sorted(item for item in oracle.items() if item[0] >= probe)
                    assert _items(reader.scan(NODES, probe)) == wanted_items
                    assert _bytes(reader.get(NODES, probe)) == oracle.get(probe)
        finally:
            index.close()
            shutil.rmtree(directory)


def _write(writer: Writer, writes: list[tuple[bytes, bytes | None]], fails: bool) -> None:
    for key, value in writes:
        if value is None:
            writer.delete(NODES, key)
        else:
            writer.put(NODES, key, value)
    if fails:
        raise ZeroDivisionError


def _bytes(view: memoryview | None) -> bytes | None:
    return None if view is None else bytes(view)


def _items(items: Iterator[Item]) -> list[tuple[bytes, bytes]]:
    return [(key, bytes(value)) for key, value in items]


# Few tokens and long runs of one, so that prompts share prefixes, and part in the middle of spans.
_PIECES = [(0,), (1,), (2**32 - 1,), (256,), (0, 1), (0,) * 20, (0,) * 112, (0,) * 113, (1,) * 130]
_PROMPTS = st.lists(st.sampled_from(_PIECES), max_size=8).map(lambda pieces: tuple(sum(pieces, ())))
_ROOTS = st.sampled_from([Root("aa" * 32, "bb" * 32), Root("aa" * 32, "bb" * 32, "tenant")])

Prompt = tuple[int, ...]


def _shared(left: Prompt, right: Prompt) -> int:
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


class StoreMachine(RuleBasedStateMachine):
    """A store under random puts, lookups, removals and reopenings, against a list of the prompts that it should hold.

    The oracle of a lookup is the longest common prefix with any prompt of the list. Removing a span takes all that
    stands on it: every prompt that goes through the span is cut off where the span starts.
    """

    persistent = True
    """Whether the store outlives its handle; without it, nothing is reopened."""

    @abstractmethod
    def open_store(self, directory: Path, chunk_tokens: int | None) -> PromptDB:
        """Return an open store; the same one each time, if ``persistent``."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = scratch_directory()
        self.prompts: list[tuple[Root, Prompt]] = []
        self.logits: set[tuple[Root, Prompt]] = set()

    @initialize(chunk_tokens=st.sampled_from([1, 2, 5, 16, 256]))
    def create(self, chunk_tokens: int) -> None:
        """Create the store."""
        self.db = self.open_store(self.directory, chunk_tokens)

    def teardown(self) -> None:
        """Close and remove the store."""
        if hasattr(self, "db"):
            self.db.close()
        shutil.rmtree(self.directory)

    @rule(
        root=_ROOTS,
        prompt=_PROMPTS,
        boundaries=st.lists(st.integers(0, 60), max_size=4),
        chunk_tokens=st.none() | st.integers(1, 300),
        start=st.none() | st.integers(0, 300),
        with_logits=st.booleans(),
    )
    def put(
        self,
        root: Root,
        prompt: Prompt,
        boundaries: list[int],
        chunk_tokens: int | None,
        start: int | None,
        with_logits: bool,
    ) -> None:
        """Store a prompt with any cuts; a ``start`` before the end of what is stored is how a race looks."""
        packed = pack_tokens(prompt)
        known = self._expected(root, prompt)
        encode = encode_tokens(packed, boundaries, chunk_tokens or self.db.chunk_tokens)
        logits = {}
        if with_logits and prompt:
            logits = {len(prompt): build_blob([(TensorSpec("logits", "F32", (2,)), bytes(8))])}
            self.logits.add((root, prompt))
        report = self.db.put(root, packed, known if start is None else min(start, known), encode, logits)
        assert report.num_tokens == len(prompt) - known
        assert report.num_dropped == 0
        self.prompts.append((root, prompt))

    @rule(root=_ROOTS, prompt=_PROMPTS)
    def lookup(self, root: Root, prompt: Prompt) -> None:
        """The longest stored prefix is found, to the token, with its logits and its blobs."""
        match = self.db.lookup(prompt, model=root.weights_id, tokenizer=root.tokenizer_id, namespace=root.namespace)
        assert match.num_tokens == self._expected(root, prompt)
        assert match.has_logits == ((root, prompt[: match.num_tokens]) in self.logits)
        position = 0
        with self.db.read() as snapshot:
            for step in match.steps:
                assert step.start == position
                assert 1 <= step.num_tokens <= step.span_tokens
                record = snapshot.record(step.node)
                assert record is not None
                assert (record.root, record.start, record.num_tokens) == (root, step.start, step.span_tokens)
                tensors = snapshot.blob(step.node, record, "tokens")
                assert tensors is not None
                assert bytes(tensors["tokens"].data)[: 4 * step.num_tokens] == match.packed[4 * position : 4 * step.end]
                position = step.end
        assert position == match.num_tokens

    @rule(at=st.integers(min_value=0))
    def remove(self, at: int) -> None:
        """Remove some span, and what stands on it."""
        nodes = list(self.db.nodes())
        if not nodes:
            return
        node, record = nodes[at % len(nodes)]
        with self.db.read() as snapshot:
            packed = self.db.prefix(snapshot, record)
        assert packed is not None
        through, start = tuple(unpack_tokens(packed)), record.start
        assert self.db.remove(node) == len(nodes) - sum(1 for _ in self.db.nodes())
        self.prompts = [
            (root, prompt[:start] if root == record.root and _shared(prompt, through) > start else prompt)
            for root, prompt in self.prompts
        ]
        self.logits = {
            (root, prompt) for root, prompt in self.logits if root != record.root or _shared(prompt, through) <= start
        }

    @precondition(lambda self: self.persistent)
    @rule()
    def reopen(self) -> None:
        """Close and open again."""
        self.db.close()
        self.db = self.open_store(self.directory, None)

    @invariant()
    def is_sound(self) -> None:
        """Nothing is damaged, and the totals are those of the prompts."""
        if not hasattr(self, "db"):
            return
        assert self.db.verify() == []
        assert self.db.stat()["num_tokens"] == self._num_distinct_prefixes()
        assert self.db.stat()["num_logits"] == len(self.logits)

    def _num_distinct_prefixes(self) -> int:
        ordered = sorted((root.digest, prompt) for root, prompt in self.prompts)
        total, last = 0, (b"", ())  # type: tuple[int, tuple[bytes, Prompt]]
        for digest, prompt in ordered:
            total += len(prompt) - (_shared(last[1], prompt) if last[0] == digest else 0)
            last = (digest, prompt)
        return total

    def _expected(self, root: Root, prompt: Prompt) -> int:
        return max((_shared(prompt, held) for held_root, held in self.prompts if held_root == root), default=0)
