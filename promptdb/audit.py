"""Checking a store's accounting against its records, for :mod:`promptdb.verify`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from promptdb.errors import CorruptDataError
from promptdb.format import LABELS, LIFE, META, QUEUE, STORE_KEY, NodeRecord, unpack_record
from promptdb.labels import PIN, next_pin_end, unpack_label
from promptdb.life import LIMITS_KEY, TTL_KEY, USAGE_KEY, Life, Usage, read_limits, read_ttls, read_usage
from promptdb.rebuild import FIRST_VERSION_WITH_LIFE, activations_charge, logits_charge, record_charge
from promptdb.served import SERVED_KEY, unpack_served
from promptdb.shared_counts import SHARED_COUNTS_KEY, unpack_shared_counts
from promptdb.tables import Reader

Finding = tuple[str, bytes, str]  # table, key, what


class _Node(NamedTuple):
    root: bytes
    start: int
    end: int


class Audit:
    """Collects what records and logits say, then compares it with ``life``, ``queue`` and the totals.

    Memory: about 700 bytes a node.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._nodes: dict[bytes, _Node] = {}
        self._sizes: Counter[bytes] = Counter()
        self._logits: dict[bytes, set[bytes]] = defaultdict(set)

    def node(self, node: bytes, record: NodeRecord, record_bytes: int) -> None:
        """Note a node whose record holds."""
        self._nodes[node] = _Node(record.root.digest, record.start, record.end)
        self._sizes[node] += record_charge(self._reader, record, record_bytes)

    def logits(self, digest: bytes, owner: bytes, value_bytes: int) -> None:
        """Note logits of a node whose record holds."""
        self._sizes[owner] += logits_charge(self._reader, value_bytes)
        self._logits[owner].add(digest)

    def activations(self, owner: bytes, key: bytes, value_bytes: int) -> None:
        """Note recorded activations of a node whose record holds."""
        self._sizes[owner] += activations_charge(self._reader, len(key), value_bytes)

    def findings(self) -> Iterator[Finding]:
        """Yield what does not hold."""
        reader = self._reader
        try:
            usage = read_usage(reader)
            read_limits(reader)
            read_ttls(reader)
        except CorruptDataError as error:
            yield META, USAGE_KEY, error.message
            return
        if usage is None:
            if _version(reader) >= FIRST_VERSION_WITH_LIFE:
                yield META, USAGE_KEY, "missing"
            return
        lives: dict[bytes, Life] = {}
        for node, data in reader.scan(LIFE):
            try:
                lives[node] = Life.unpack(node, data)
            except CorruptDataError as error:
                yield LIFE, node, error.message
                continue
            if node not in self._nodes:
                yield LIFE, node, "an entry without a node"
        yield from self._lives(lives)
        yield from self._queue(lives)
        yield from self._pins(lives)
        yield from self._usage(usage, lives)

    def _lives(self, lives: dict[bytes, Life]) -> Iterator[Finding]:
        children = Counter(life.parent for life in lives.values())
        for node, place in self._nodes.items():
            life = lives.get(node)
            if life is None:
                yield LIFE, node, "a node without an entry that holds"
                continue
            if life.size_bytes != self._sizes[node]:
                yield LIFE, node, f"charged {life.size_bytes} bytes, counted {self._sizes[node]}"
            if set(life.logits) != self._logits[node] or len(life.logits) != len(self._logits[node]):
                yield LIFE, node, "other logits are its own"
            if life.num_children != children[node]:
                yield LIFE, node, f"{life.num_children} spans stand on it, counted {children[node]}"
            parent, above = self._nodes.get(life.parent), lives.get(life.parent)
            if bool(life.parent) != bool(place.start):
                yield LIFE, node, f"it starts at {place.start}, and its parent is {life.parent.hex()[:16]!r}"
            if parent is not None and (parent.root != place.root or not parent.start < place.start <= parent.end):
                yield LIFE, node, "it cannot stand on its parent"
            if above is not None and life.expires_unix_s > above.expires_unix_s:
                yield LIFE, node, "it outlives what it stands on"

    def _queue(self, lives: dict[bytes, Life]) -> Iterator[Finding]:
        wanted = {key for node, life in lives.items() for key in life.queue_keys(node)}
        for key in self._reader.keys(QUEUE):
            if key not in wanted:
                yield QUEUE, key, "an entry that should not be"
            wanted.discard(key)
        for key in wanted:
            yield QUEUE, key, "missing"

    def _pins(self, lives: dict[bytes, Life]) -> Iterator[Finding]:
        ends: dict[bytes, float] = defaultdict(float)
        for key, data in self._reader.scan(LABELS):
            try:
                label = unpack_label(key, data)
            except CorruptDataError as error:
                yield LABELS, key, error.message
                continue
            node = label.node if label.kind == PIN else b""
            while node and (life := lives.get(node)) is not None:
                ends[node] = max(ends[node], label.expires_unix_s)
                node = life.parent
        for node, life in lives.items():
            if life.pinned_unix_s != ends[node]:
                yield LIFE, node, f"pinned until {life.pinned_unix_s}, counted {ends[node]}"

    def _usage(self, usage: Usage, lives: dict[bytes, Life]) -> Iterator[Finding]:
        pinned = sum(life.size_bytes for life in lives.values() if life.pinned_unix_s)
        orphans = sum(1 for life in lives.values() if life.parent and life.parent not in lives)
        try:
            next_pin = next_pin_end(self._reader)
        except CorruptDataError:
            return  # said already
        counted = {
            "charged_bytes": self._sizes.total(),
            "pinned_bytes": pinned,
            "num_orphans": orphans,
            "next_pin_unix_s": next_pin,
        }
        for name, amount in counted.items():
            if getattr(usage, name) != amount:
                yield META, USAGE_KEY, f"{name} is {getattr(usage, name)}, counted {amount}"
        quota = read_limits(self._reader).quota_bytes
        if quota and usage.charged_bytes > quota:
            yield META, USAGE_KEY, f"{usage.charged_bytes} bytes are charged, over the quota of {quota}"


def _version(reader: Reader) -> int:
    data = reader.get(META, STORE_KEY)
    version = 0 if data is None else unpack_record(STORE_KEY, data).get("format_version")
    return version if isinstance(version, int) else 0


def unsound_settings(reader: Reader) -> Iterator[tuple[str, bytes]]:
    """Yield (table, key) of limits, totals, times to live, pins and tags that do not hold, for a repair to take out."""
    for key, data in reader.scan(META):
        try:
            unpack_record(key, data)
            if key == LIMITS_KEY:
                read_limits(reader)
            elif key == USAGE_KEY:
                read_usage(reader)
            elif key.startswith(SERVED_KEY):
                unpack_served(key, data)
            elif key == SHARED_COUNTS_KEY:
                unpack_shared_counts(data)
        except CorruptDataError:
            if key in (LIMITS_KEY, USAGE_KEY, SHARED_COUNTS_KEY) or key.startswith((TTL_KEY, SERVED_KEY)):
                yield META, key
    for key, data in reader.scan(LABELS):
        try:
            unpack_label(key, data)
        except CorruptDataError:
            yield LABELS, key
