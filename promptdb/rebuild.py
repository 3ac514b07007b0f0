"""Making a store's accounting from its records: for stores of format version 1, and where it was damaged."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from promptdb.errors import CorruptDataError
from promptdb.format import (
    ACTIVATIONS,
    BLOBS,
    CHILDREN,
    LIFE,
    LOGITS,
    META,
    NODES,
    QUEUE,
    STORE_KEY,
    NodeRecord,
    pack_record,
    unpack_record,
)
from promptdb.keys import DIGEST_BYTES, TOKEN_BYTES, PrefixHasher, num_tokens
from promptdb.labels import PIN, read_labels
from promptdb.life import NEVER, NODE_BYTES, Life, Usage, charge, priority, read_limits, read_usage
from promptdb.snapshot import logits_owner
from promptdb.tables import Reader, Writer
from promptdb.trie import descendants

FIRST_VERSION_WITH_LIFE = 2
FIRST_VERSION_WITH_CODING = 3
FIRST_VERSION_WITH_ACTIVATIONS = 3
NOBODY = b"\xff" * DIGEST_BYTES
"""Stands for a parent that is gone and whose ID is not known."""


class _Place(NamedTuple):
    """Where a span is, for finding what it stands on."""

    root: bytes
    child_hash: bytes
    start: int
    end: int
    first: bytes  # token


def record_charge(reader: Reader, record: NodeRecord, record_bytes: int) -> int:
    """Return what a node is charged without its logits, in the store of ``reader``."""
    total = NODE_BYTES + charge(*reader.stored_sizes(NODES, DIGEST_BYTES, record_bytes))
    total += charge(*reader.stored_sizes(CHILDREN, DIGEST_BYTES + TOKEN_BYTES, DIGEST_BYTES + len(record.span)))
    for kind, blob in record.blobs.items():
        total += charge(*reader.stored_sizes(BLOBS, DIGEST_BYTES + len(kind.encode()), blob.size_bytes))
    return total


def logits_charge(reader: Reader, value_bytes: int) -> int:
    """Return what stored logits count for, in the store of ``reader``."""
    return charge(*reader.stored_sizes(LOGITS, DIGEST_BYTES, value_bytes))


def activations_charge(reader: Reader, key_bytes: int, value_bytes: int) -> int:
    """Return what recorded activations count for, in the store of ``reader``."""
    return charge(*reader.stored_sizes(ACTIVATIONS, key_bytes, value_bytes))


def saved_seconds(record: NodeRecord) -> float:
    """Return the time that a record says its span took; 0 for what is no time."""
    seconds = float(record.compute_s)
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def upgrade(writer: Writer) -> Usage:
    """Give a store of format version 1 its accounting, and the version that says so.

    Notes
    -----
    For :mod:`promptdb.migrate` and for repairs: about 50 microseconds a node, in one transaction.
    """
    require_version(writer, FIRST_VERSION_WITH_LIFE)
    return rebuild(writer)


def require_version(writer: Writer, version: int) -> None:
    """Raise the format version of a store, if it is lower: older programs would misread what is written now."""
    data = writer.get(META, STORE_KEY)
    if data is not None:
        fields = unpack_record(STORE_KEY, data)
        if fields.get("format_version", 0) < version:
            writer.put(META, STORE_KEY, pack_record(STORE_KEY, {**fields, "format_version": version}))


def rebuild(writer: Writer) -> Usage:
    """Make ``life``, ``queue`` and the totals from records, logits and pins.

    What only an entry of ``life`` knows (last use, expiry, rank) is kept where the entry holds. Nodes whose record does
    not hold are left out.

    Notes
    -----
    Memory: about 600 bytes a node.
    """
    usage = _sound_usage(writer)
    limits = read_limits(writer)
    lives, places = _lives(writer, limits.policy, usage.inflation)
    usage.num_orphans = _set_parents(writer, lives, places)
    for life in lives.values():
        if life.parent in lives:
            lives[life.parent].num_children += 1
    for node in sorted(lives, key=lambda node: -places[node].start):  # children before parents
        parent = lives.get(lives[node].parent)
        if parent is not None:
            parent.expires_unix_s = max(parent.expires_unix_s, lives[node].expires_unix_s)
    usage.next_pin_unix_s = _set_pins(writer, lives)
    usage.charged_bytes = sum(life.size_bytes for life in lives.values())
    usage.pinned_bytes = sum(life.size_bytes for life in lives.values() if life.pinned_unix_s)
    for table in (LIFE, QUEUE):
        for key in list(writer.keys(table)):
            writer.delete(table, key)
    for node, life in lives.items():
        writer.put(LIFE, node, life.pack(node))
    for key in sorted(key for node, life in lives.items() for key in life.queue_keys(node)):
        writer.put(QUEUE, key, b"")
    usage.write(writer)
    return usage


def _sound_usage(reader: Reader) -> Usage:
    try:
        return read_usage(reader) or Usage()
    except CorruptDataError:
        return Usage()


def _lives(writer: Writer, policy: str, inflation: float) -> tuple[dict[bytes, Life], dict[bytes, _Place]]:
    lives: dict[bytes, Life] = {}
    places: dict[bytes, _Place] = {}
    for node, value in writer.scan(NODES):
        try:
            record = NodeRecord.unpack(node, value)
        except CorruptDataError:
            continue
        created = record.created_unix_s
        size_bytes = record_charge(writer, record, len(value))
        life = Life(record.parent, 0, size_bytes, NEVER, 0.0, created, 0.0, saved_seconds(record), created)
        before = _sound_life(writer, node)
        if before is None:
            life.priority = priority(policy, life, inflation)
        else:
            life.parent, life.expires_unix_s = before.parent, before.expires_unix_s
            life.used_unix_s, life.priority = before.used_unix_s, before.priority
        lives[node] = life
        first = record.span[:TOKEN_BYTES]
        places[node] = _Place(record.root.digest, record.child_hash, record.start, record.end, first)
    for digest, value in writer.scan(LOGITS):
        owner = lives.get(logits_owner(value))
        if owner is not None:
            owner.logits.append(digest)
            owner.size_bytes += logits_charge(writer, len(value))
    for key, value in writer.scan(ACTIVATIONS):
        owner = lives.get(key[:DIGEST_BYTES])
        if owner is not None:
            owner.size_bytes += activations_charge(writer, len(key), len(value))
    return lives, places


def _sound_life(reader: Reader, node: bytes) -> Life | None:
    data = reader.get(LIFE, node)
    try:
        return None if data is None else Life.unpack(node, data)
    except CorruptDataError:
        return None


def _set_parents(reader: Reader, lives: dict[bytes, Life], places: dict[bytes, _Place]) -> int:
    """Find the span that each one stands on where its entry does not know; return how many stand on none."""
    lost: dict[bytes, dict[bytes, list[bytes]]] = defaultdict(lambda: defaultdict(list))  # by root and child hash
    for node, life in lives.items():
        place, parent = places[node], places.get(life.parent)
        if place.start == 0:
            life.parent = b""
        elif parent is None or parent.root != place.root or not parent.start < place.start <= parent.end:
            lost[place.root][place.child_hash].append(node)
    num_orphans = 0
    for root, by_hash in lost.items():
        orphans = {node for nodes in by_hash.values() for node in nodes}
        for holder, node in _holders(reader, root, by_hash, places):
            lives[node].parent = holder
            orphans.discard(node)
        for node in orphans:
            if lives[node].parent in lives or not lives[node].parent:
                lives[node].parent = NOBODY
        num_orphans += len(orphans)
    return num_orphans


def _holders(
    reader: Reader, root: bytes, by_hash: dict[bytes, list[bytes]], places: dict[bytes, _Place]
) -> Iterator[tuple[bytes, bytes]]:
    """Yield (node, one of ``by_hash`` that stands on it). A walk over all that can be reached: microseconds a token."""
    try:
        for start, holder, tokens in descendants(reader, root, b"", -1):
            hasher, end = PrefixHasher(root, tokens), num_tokens(tokens)
            for position in range(start + 1, end + 1):
                for node in by_hash.get(hasher.at(position), ()):
                    at = position * TOKEN_BYTES
                    if node != holder and places[node].first != tokens[at : at + TOKEN_BYTES]:
                        yield holder, node
    except CorruptDataError:
        return  # the index is damaged: what was not reached counts as lost


def _set_pins(reader: Reader, lives: dict[bytes, Life]) -> float:
    """Enter the ends of all pins along their paths; return when the first one ends."""
    first = NEVER
    for label in read_labels(reader, PIN):
        first = min(first, label.expires_unix_s)
        node = label.node
        while (life := lives.get(node)) is not None:
            life.pinned_unix_s = max(life.pinned_unix_s, label.expires_unix_s)
            node = life.parent
    return first
