"""Puts and removals: what is made before their transaction, and what they do inside."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from promptdb.activations import Series
from promptdb.errors import InputTypeError, PromptDBError, PromptError, StoreError, StoreFullError
from promptdb.events import warn
from promptdb.eviction import evict, keep_quota
from promptdb.format import BLOBS, CHECKSUM_BYTES, LOGITS, NODES, BlobEntry, Layout, NodeRecord, checksum
from promptdb.keys import TOKEN_BYTES, PrefixHasher, Root, node_id, num_tokens
from promptdb.ledger import Ledger, with_ledger
from promptdb.life import DEFAULT_COMPRESSION, NEVER, read_limits, read_ttl, read_usage
from promptdb.outbox import Outbox
from promptdb.packing import pack
from promptdb.rebuild import FIRST_VERSION_WITH_ACTIVATIONS, FIRST_VERSION_WITH_CODING, require_version
from promptdb.served import Served, write_served
from promptdb.snapshot import pack_logits
from promptdb.tables import Index, Writer
from promptdb.trie import attach, children, match

# Of what is stored, what a full disk makes go at least.
_SPACE_SHARE = 1 / 16
_FIRST_BATCH = 8

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class SpanPayload:
    """A computed span that is to be stored: prompt positions ``[start, end)`` and its blobs."""

    start: int
    end: int
    layout: Layout
    blobs: Mapping[str, Bytes]
    compute_s: float
    provenance: Mapping[str, str | int | float]
    recorded: Sequence[tuple[Series, bytearray | memoryview]] = ()  # as in promptdb.recordings.RecordedRows


@dataclass(frozen=True)
class PutRequest:
    """One put: new spans of a prompt of n tokens, and logits.

    Parameters
    ----------
    root : identity that the spans were computed with.
    packed : the prompt's packed tokens.
    start : position that the first new span starts at; ``[0, start)`` should be stored already, or be stored by a
        request that comes before this one.
    encode : returns the spans that tile ``[position, n)``; called with ``start``, and again with a later position if
        somebody stored a part of the first span meanwhile. Never called inside a transaction.
    logits : by position i, a blob with next-token logits after ``[0, i)``.
    ttl_s : how long the prompt lives at least, from now, in seconds; infinite: for ever. None: as the store's setting
        for its namespace says. What is stored of it already then lives as long too, if it would not have.
    is_shared : it comes from the shared store, and need not go there.
    """

    root: Root
    packed: bytes
    start: int
    encode: Callable[[int], Sequence[SpanPayload]]
    logits: Mapping[int, Bytes] = field(default_factory=dict)
    ttl_s: float | None = None
    is_shared: bool = False


@dataclass(frozen=True)
class PutReport:
    """What a put did: spans and tokens that were new, and bytes written for them."""

    num_spans: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_dropped: int = 0  # spans whose prefix somebody removed meanwhile: they would never be found


class OverlapError(Exception):
    """Somebody stored a part of a span meanwhile: encode again from ``position``."""

    def __init__(self, position: int) -> None:
        self.position = position


class _OverlapsError(Exception):
    """Puts of a transaction, by their number, that have to be encoded again from a position."""

    def __init__(self, positions: Mapping[int, int]) -> None:
        self.positions = positions


def check_packed(packed: bytes) -> None:
    """Raise :class:`PromptError` if bytes are no packed tokens."""
    if len(packed) % TOKEN_BYTES:
        raise PromptError(
            f"{len(packed)} bytes are no packed tokens", f"a token has {TOKEN_BYTES} bytes: pack_tokens()"
        )


def check_spans(spans: Sequence[SpanPayload], start: int, packed: bytes) -> list[SpanPayload]:
    """Return the spans of a put; raise :class:`PromptError` unless they tile the prompt from ``start``."""
    position = start
    for span in spans:
        if span.start != position or span.end <= span.start:
            break
        position = span.end
    else:
        if 0 <= start <= position <= num_tokens(packed):
            return list(spans)
    bounds = [(span.start, span.end) for span in spans]
    raise PromptError(f"spans {bounds} do not tile positions from {start} of a prompt of {num_tokens(packed)} tokens")


def check_ttl(ttl_s: object) -> None:
    """Raise what is wrong with a time to live."""
    if ttl_s is None:
        return
    if isinstance(ttl_s, bool) or not isinstance(ttl_s, (int, float)):
        raise InputTypeError(f"a time to live must be a number of seconds, not {type(ttl_s).__name__}")
    if not ttl_s > 0:
        raise StoreError(f"a time to live of {ttl_s} s", "choose more than 0 seconds")


class _Span(NamedTuple):
    payload: SpanPayload
    child_hash: bytes
    tokens: bytes
    node: bytes
    blobs: Mapping[str, Bytes]  # as the store keeps them
    entries: Mapping[str, BlobEntry]
    recorded: Sequence[tuple[bytes, bytearray | memoryview]]  # keys and values


class _Prepared:
    """A request with all that can be computed before the transaction: other writers wait for that one.

    Raises
    ------
    PromptError
        Tokens, spans or positions that do not fit each other.
    """

    def __init__(self, request: PutRequest, compression: str) -> None:
        check_packed(request.packed)
        check_ttl(request.ttl_s)
        total = num_tokens(request.packed)
        self.request = request
        self.is_compressed = compression != DEFAULT_COMPRESSION
        self.spans: list[_Span] = []
        self.encode_from(request.start)
        if any(not 1 <= position <= total for position in request.logits):
            raise PromptError(f"logits after {sorted(request.logits)} tokens of a prompt of {total}")
        self.logits = {position: self._stored(blob) for position, blob in sorted(request.logits.items())}

    def _stored(self, blob: Bytes) -> Bytes:
        """Return a blob as the store keeps it."""
        return pack(blob) if self.is_compressed else blob

    def encode_from(self, position: int) -> None:
        """Make the spans from ``position`` on."""
        root, packed = self.request.root, self.request.packed
        # What ends before an overlap stays: it may be this put's own, with spans that stood on it before.
        self.spans = [span for span in self.spans if span.payload.end <= position]
        hasher = PrefixHasher(root.digest, packed)
        for payload in check_spans(self.request.encode(position), position, packed):
            child_hash = hasher.at(payload.start)
            tokens = packed[payload.start * TOKEN_BYTES : payload.end * TOKEN_BYTES]
            node = node_id(child_hash, tokens)
            blobs = {kind: self._stored(blob) for kind, blob in payload.blobs.items()}
            entries = {kind: BlobEntry(len(blob), checksum(node + kind.encode(), blob)) for kind, blob in blobs.items()}
            recorded = [(series.key(node), value) for series, value in payload.recorded]
            for key, value in recorded:
                value[:CHECKSUM_BYTES] = checksum(key, memoryview(value)[CHECKSUM_BYTES:])
            self.spans.append(_Span(payload, child_hash, tokens, node, blobs, entries, recorded))


def put_all(
    index: Index,
    requests: Sequence[PutRequest],
    *,
    clock: Callable[[], float] = time.time,
    used: Mapping[bytes, float] | None = None,
    served: Mapping[str, Served] | None = None,
    to_share: bool = False,
) -> list[PutReport]:
    """Store what is not stored yet in one transaction; see :meth:`promptdb.PromptDB.put_many`.

    Parameters
    ----------
    clock : seconds since 1970.
    used : last use of other prompts, by the last span of each, to be written with it.
    served : counts by weights ID, to be written with it.
    to_share : queue what is new for the shared store, in the same transaction.
    """
    if not requests:
        return []
    compression = _compression(index)
    puts = [_Prepared(request, compression) for request in requests]
    try:
        return _commit(index, puts, clock, used or {}, served or {}, to_share)
    except StoreFullError as error:
        if not _make_space(index, puts, clock, error):
            raise
        return _commit(index, puts, clock, {}, served or {}, to_share)


def _compression(index: Index) -> str:
    with index.read() as reader:
        return read_limits(reader).compression


def _commit(
    index: Index,
    puts: Sequence[_Prepared],
    clock: Callable[[], float],
    used: Mapping[bytes, float],
    served: Mapping[str, Served],
    to_share: bool,
) -> list[PutReport]:
    def work(ledger: Ledger) -> list[PutReport]:
        ledger.touch(used)
        write_served(ledger.writer, served)
        reports = _put_in_order(ledger, puts, Outbox(ledger.writer, ledger.now) if to_share else None)
        keep_quota(ledger)
        return reports

    while True:
        try:
            return with_ledger(index, clock(), work, frees=False)
        except _OverlapsError as overlaps:
            for number, position in overlaps.positions.items():
                puts[number].encode_from(position)


def _make_space(index: Index, puts: Sequence[_Prepared], clock: Callable[[], float], error: StoreFullError) -> bool:
    """Evict so much that puts which met a full disk should find room in the file; return whether anything went.

    A few spans first, and ever more: removing takes pages too, and each step frees those for the next.
    """
    wanted = 2 * sum(entry.size_bytes for put in puts for span in put.spans for entry in span.entries.values())
    wanted += 2 * sum(len(value) for put in puts for span in put.spans for _, value in span.recorded)
    with index.read() as reader:
        usage = read_usage(reader)
    charged = 0 if usage is None else usage.charged_bytes
    goal = max(0, charged - max(wanted, int(_SPACE_SHARE * charged)))
    removed, batch = 0, _FIRST_BATCH

    def note(ledger: Ledger) -> None:
        ledger.usage.room_bytes = max(1, ledger.usage.charged_bytes)

    try:
        while gone := with_ledger(
            index,
            clock(),
            lambda ledger: evict(ledger, enough_bytes=goal, goal_bytes=goal, max_nodes=batch),  # noqa: B023 - run at once
        ):
            removed, batch = removed + gone, 2 * batch
        if removed:
            # Also because LMDB uses a page again only in the second transaction after the one that freed it.
            with_ledger(index, clock(), note)
    except PromptDBError as failure:
        warn("eviction_failed", f"evicting failed on a full disk: {failure.message}", reason=failure.message)
    if removed:
        warn(
            "disk_full",
            f"{error.message}; evicted {removed} spans, trying again",
            num_evicted=removed,
            wanted_bytes=wanted,
        )
    return removed > 0


def _put_in_order(ledger: Ledger, puts: Sequence[_Prepared], outbox: Outbox | None) -> list[PutReport]:
    reports, overlaps = [], {}
    ttls: dict[str, float | None] = {}
    for number, put in enumerate(puts):
        root, ttl_s = put.request.root, put.request.ttl_s
        if root.kv_codec:
            require_version(ledger.writer, FIRST_VERSION_WITH_CODING)
        if ttl_s is None:
            if root.namespace not in ttls:
                ttls[root.namespace] = read_ttl(ledger.writer, root.namespace)
            ttl_s = ttls[root.namespace]
        try:
            expires = NEVER if ttl_s is None else ledger.now + ttl_s
            reports.append(_put(ledger, put, expires, None if put.request.is_shared else outbox))
        except OverlapError as overlap:
            # It goes on, so that one more attempt is enough, however many overlap.
            overlaps[number] = overlap.position
    if overlaps:
        raise _OverlapsError(overlaps)
    return reports


def _put(ledger: Ledger, put: _Prepared, expires_unix_s: float, outbox: Outbox | None) -> PutReport:
    writer = ledger.writer
    root, packed = put.request.root, put.request.packed
    walk = match(writer, root.digest, packed)
    covered = walk.num_tokens
    owner = walk.steps[-1].node if walk.steps else b""
    ledger.protected.update(step.node for step in walk.steps)
    written = tokens = size_bytes = dropped = 0
    for number, (span, child_hash, ids, node, blobs, entries, recorded) in enumerate(put.spans):
        if span.end <= covered:
            continue
        if span.start < covered:
            _enter(writer, put, covered)
            raise OverlapError(covered)
        if span.start > covered:
            dropped = len(put.spans) - number
            break
        for kind, blob in blobs.items():
            writer.put(BLOBS, node + kind.encode(), blob)
        record = NodeRecord(
            root, owner, child_hash, span.start, ids, span.layout, entries, ledger.now, span.compute_s, span.provenance
        )
        data = record.pack(node)
        writer.put(NODES, node, data)
        attach(writer, child_hash, ids, node)
        ledger.add(node, record, len(data), expires_unix_s)
        if recorded:
            require_version(writer, FIRST_VERSION_WITH_ACTIVATIONS)
        for key, value in recorded:
            ledger.put_activations(root, node, key, value)
            size_bytes += len(value)
        if outbox is not None:
            outbox.add_span(node)
        if ledger.usage.num_orphans:
            _adopt(ledger, record, node, packed)
        written, tokens, size_bytes = written + 1, tokens + record.num_tokens, size_bytes + record.size_bytes
        # Spans that stood on this position before it was removed can be reached again.
        walk = match(writer, root.digest, packed, span.end)
        covered = walk.num_tokens
        owner = walk.steps[-1].node if walk.steps else node
        ledger.protected.update(step.node for step in walk.steps)
    ledger.extend(owner, expires_unix_s)
    if not dropped:
        size_bytes += _put_logits(ledger, put, covered, outbox)
    return PutReport(written, tokens, size_bytes, dropped)


def _put_logits(ledger: Ledger, put: _Prepared, covered: int, outbox: Outbox | None) -> int:
    writer, root, packed = ledger.writer, put.request.root, put.request.packed
    size_bytes = 0
    for position, blob in put.logits.items():
        if position <= covered:
            digest = PrefixHasher(root.digest, packed).at(position)
            if writer.size(LOGITS, digest) is None:
                holder = match(writer, root.digest, packed[: position * TOKEN_BYTES]).steps[-1].node
                value = pack_logits(digest, holder, blob)
                writer.put(LOGITS, digest, value)
                ledger.add_logits(root, holder, digest, len(value))
                if outbox is not None:
                    outbox.add_logits(digest, holder)
                size_bytes += len(value)
    return size_bytes


def _adopt(ledger: Ledger, record: NodeRecord, node: bytes, packed: bytes) -> None:
    """Let spans whose parent is gone stand on a node that was stored just now. 3 microseconds a token."""
    hasher = PrefixHasher(record.root.digest, packed)
    for position in range(record.start + 1, record.end + 1):
        own = packed[position * TOKEN_BYTES : (position + 1) * TOKEN_BYTES] if position < record.end else b""
        for child, span in list(children(ledger.writer, hasher.at(position))):
            # One that repeats a token of the node's own is not on any path.
            if span[:TOKEN_BYTES] != own:
                ledger.adopt(node, child)


def _enter(writer: Writer, put: _Prepared, position: int) -> None:
    """Enter what an attempt that fails would have stored from ``position`` on: the puts after it may meet it."""
    packed = put.request.packed
    digest = PrefixHasher(put.request.root.digest, packed).at(position)
    tokens = packed[position * TOKEN_BYTES : put.spans[-1].payload.end * TOKEN_BYTES]
    attach(writer, digest, tokens, node_id(digest, tokens))
