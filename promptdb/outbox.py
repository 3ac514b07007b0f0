"""The durable queue of what the shared store does not have yet: names of spans and logits, written with them.

An entry is put in by the transaction that stores what it names, and taken out when that has arrived on the far side. A
crash loses nothing; what was sent and not taken out is found there, and costs a question.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from promptdb.format import OUTBOX
from promptdb.keys import DIGEST_BYTES
from promptdb.tables import Reader, Writer

SPAN = b"s"
LOGITS_OF = b"l"
_TIME_BYTES = 8


class Waiting(NamedTuple):
    """An entry of the queue: its key, what kind of thing it names, and the ID: of a node, or a prefix digest."""

    key: bytes
    kind: bytes
    identity: bytes


class Outbox:
    """Queues what one transaction stores. Belongs to it."""

    def __init__(self, writer: Writer, now: float) -> None:
        self._writer = writer
        self._time = int(now * 1e6)
        self._nodes: set[bytes] = set()

    def add_span(self, node: bytes) -> None:
        """Queue a span; logits that are stored with it go along."""
        self._nodes.add(node)
        self._add(SPAN, node)

    def add_logits(self, digest: bytes, holder: bytes) -> None:
        """Queue logits after a prefix, unless the span that holds its last token is queued by this transaction."""
        if holder not in self._nodes:
            self._add(LOGITS_OF, digest)

    def _add(self, kind: bytes, identity: bytes) -> None:
        self._time += 1  # in the order in which they are stored: what others stand on comes first
        self._writer.put(OUTBOX, self._time.to_bytes(_TIME_BYTES, "big") + kind + identity, b"")


def waiting(reader: Reader, most: int) -> list[Waiting]:
    """Return the oldest entries."""
    keys = (key for key, _ in itertools.islice(reader.scan(OUTBOX), most))
    return [
        Waiting(key, key[_TIME_BYTES : _TIME_BYTES + 1], key[_TIME_BYTES + 1 :])
        for key in keys
        if len(key) == _TIME_BYTES + 1 + DIGEST_BYTES
    ]


def take_out(writer: Writer, keys: Iterable[bytes]) -> None:
    """Remove entries."""
    for key in keys:
        writer.delete(OUTBOX, key)


def oldest_unix_s(reader: Reader) -> float | None:
    """Return when the oldest entry was put in, or None if nothing waits."""
    for entry in waiting(reader, 1):
        return int.from_bytes(entry.key[:_TIME_BYTES], "big") / 1e6
    return None
