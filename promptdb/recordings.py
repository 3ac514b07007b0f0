"""Storing recorded activations: one transaction for many, with their accounting."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from promptdb.activations import Series, is_of, merged, pack_entry, read_entry
from promptdb.errors import CorruptDataError
from promptdb.events import warn
from promptdb.eviction import keep_quota
from promptdb.format import (
    ACTIVATIONS,
    CHECKSUM_BYTES,
    NODES,
    NodeRecord,
    checksum,
)
from promptdb.ledger import Ledger, with_ledger
from promptdb.rebuild import FIRST_VERSION_WITH_ACTIVATIONS, require_version
from promptdb.tables import Index


@dataclass(frozen=True)
class RecordedRows:
    """Rows of one span that are to be stored.

    Attributes
    ----------
    node : the span.
    series : what they are.
    value : room for a checksum (16 bytes), then their blob; see FORMAT.md. Written into, once, to fill in the checksum.
    """

    node: bytes
    series: Series
    value: bytearray | memoryview

    @property
    def blob(self) -> memoryview:
        """The part after the checksum."""
        return memoryview(self.value)[CHECKSUM_BYTES:]


@dataclass(frozen=True)
class RecordReport:
    """Entries that are new or have new rows, bytes written for them, and how many were of spans that are gone."""

    num_entries: int = 0
    num_bytes: int = 0
    num_dropped: int = 0


def put_recordings(
    index: Index, recordings: Sequence[RecordedRows], *, clock: Callable[[], float] = time.time
) -> RecordReport:
    """Store rows that are not stored yet, in one transaction; see :meth:`promptdb.PromptDB.put_activations`."""
    if not recordings:
        return RecordReport()
    for each in recordings:
        each.value[:CHECKSUM_BYTES] = checksum(each.series.key(each.node), each.blob)

    def work(ledger: Ledger) -> RecordReport:
        # Older versions would remove a span and leave its activations.
        require_version(ledger.writer, FIRST_VERSION_WITH_ACTIVATIONS)
        records: dict[bytes, NodeRecord | None] = {}
        entries = size_bytes = dropped = 0
        for each in recordings:
            if each.node not in records:
                data = ledger.writer.get(NODES, each.node)
                records[each.node] = None if data is None else NodeRecord.unpack(each.node, data)
                ledger.protected.update(ledger.path(each.node))
            record = records[each.node]
            if record is None:
                dropped += 1
                continue
            written = _put(ledger, record, each)
            entries, size_bytes = entries + bool(written), size_bytes + written
        keep_quota(ledger)
        return RecordReport(entries, size_bytes, dropped)

    return with_ledger(index, clock(), work, frees=False)


def _put(ledger: Ledger, record: NodeRecord, recorded: RecordedRows) -> int:
    key = recorded.series.key(recorded.node)
    value: bytes | bytearray | memoryview = recorded.value
    standing = ledger.writer.get(ACTIVATIONS, key)
    if standing is not None:
        content = bytes(standing)
        try:
            if checksum(key, content[CHECKSUM_BYTES:]) != content[:CHECKSUM_BYTES]:
                raise CorruptDataError("the checksum of recorded activations does not hold")
            entry = read_entry(content[CHECKSUM_BYTES:])
            if not is_of(entry, recorded.series, record.num_tokens, record.start):
                raise CorruptDataError("recorded activations are not those of the span")
            blob = merged(entry, read_entry(recorded.blob))
            if blob is None:
                return 0
            value = pack_entry(key, blob)
        except CorruptDataError as error:
            warn("damage", f"{recorded.series}: {error.message}; recorded again", node=recorded.node.hex())
    ledger.put_activations(record.root, recorded.node, key, value)
    return len(value)
