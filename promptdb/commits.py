"""Puts and removals: what is made before their transaction, and what they do inside."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from promptdb.errors import PromptError
from promptdb.format import (
    BLOBS,
    LOGITS,
    NODES,
    ROOTS,
    TOTALS,
    BlobEntry,
    Layout,
    NodeRecord,
    checksum,
    pack_root,
    unpack_root,
)
from promptdb.keys import TOKEN_BYTES, PrefixHasher, Root, node_id, num_tokens
from promptdb.snapshot import Snapshot, Verified, logits_owner, pack_logits
from promptdb.tables import Index, Reader, Writer
from promptdb.trie import attach, detach, match

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
    """

    root: Root
    packed: bytes
    start: int
    encode: Callable[[int], Sequence[SpanPayload]]
    logits: Mapping[int, Bytes] = field(default_factory=dict)


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


def add_to_totals(writer: Writer, root: Root, nodes: int, tokens: int, size_bytes: int) -> None:
    """Change the totals of a root, which goes when its last span does."""
    data = writer.get(ROOTS, root.digest)
    totals = dict.fromkeys(TOTALS, 0) if data is None else unpack_root(root.digest, data)[1]
    totals["num_nodes"] += nodes
    totals["num_tokens"] += tokens
    totals["blob_bytes"] += size_bytes
    if totals["num_nodes"]:
        writer.put(ROOTS, root.digest, pack_root(root, totals))
    else:
        writer.delete(ROOTS, root.digest)


class _Span(NamedTuple):
    payload: SpanPayload
    child_hash: bytes
    tokens: bytes
    node: bytes
    blobs: Mapping[str, BlobEntry]


class _Prepared:
    """A request with all that can be computed before the transaction: other writers wait for that one.

    Raises
    ------
    PromptError
        Tokens, spans or positions that do not fit each other.
    """

    def __init__(self, request: PutRequest) -> None:
        check_packed(request.packed)
        total = num_tokens(request.packed)
        self.request = request
        self.spans: list[_Span] = []
        self.encode_from(request.start)
        if any(not 1 <= position <= total for position in request.logits):
            raise PromptError(f"logits after {sorted(request.logits)} tokens of a prompt of {total}")

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
            blobs = {
                kind: BlobEntry(len(blob), checksum(node + kind.encode(), blob)) for kind, blob in payload.blobs.items()
            }
            self.spans.append(_Span(payload, child_hash, tokens, node, blobs))


def put_all(index: Index, requests: Sequence[PutRequest]) -> list[PutReport]:
    """Store what is not stored yet in one transaction; see :meth:`promptdb.PromptDB.put_many`."""
    if not requests:
        return []
    puts = [_Prepared(request) for request in requests]
    while True:
        try:
            return index.transact(lambda writer: _put_in_order(writer, puts))
        except _OverlapsError as overlaps:
            for number, position in overlaps.positions.items():
                puts[number].encode_from(position)


def _put_in_order(writer: Writer, puts: Sequence[_Prepared]) -> list[PutReport]:
    reports, overlaps = [], {}
    for number, put in enumerate(puts):
        try:
            reports.append(_put(writer, put))
        except OverlapError as overlap:
            # It goes on, so that one more attempt is enough, however many overlap.
            overlaps[number] = overlap.position
    if overlaps:
        raise _OverlapsError(overlaps)
    # Once per root: with every put they would be half of the work of a small one.
    new: dict[Root, list[PutReport]] = {}
    for put, report in zip(puts, reports, strict=True):
        new.setdefault(put.request.root, []).append(report)
    for root, added in new.items():
        nodes, tokens = sum(each.num_spans for each in added), sum(each.num_tokens for each in added)
        size_bytes = sum(each.num_bytes for each in added)
        if nodes or size_bytes:
            add_to_totals(writer, root, nodes, tokens, size_bytes)
    return reports


def _put(writer: Writer, put: _Prepared) -> PutReport:
    root, packed = put.request.root, put.request.packed
    walk = match(writer, root.digest, packed)
    covered = walk.num_tokens
    owner = walk.steps[-1].node if walk.steps else b""
    written = tokens = size_bytes = 0
    for position, (span, child_hash, ids, node, entries) in enumerate(put.spans):
        if span.end <= covered:
            continue
        if span.start < covered:
            _enter(writer, put, covered)
            raise OverlapError(covered)
        if span.start > covered:
            return PutReport(written, tokens, size_bytes, len(put.spans) - position)
        for kind, blob in span.blobs.items():
            writer.put(BLOBS, node + kind.encode(), blob)
        record = NodeRecord(
            root, owner, child_hash, span.start, ids, span.layout, entries, time.time(), span.compute_s, span.provenance
        )
        writer.put(NODES, node, record.pack(node))
        attach(writer, child_hash, ids, node)
        written, tokens, size_bytes = written + 1, tokens + record.num_tokens, size_bytes + record.size_bytes
        # Spans that stood on this position before it was removed can be reached again.
        walk = match(writer, root.digest, packed, span.end)
        covered = walk.num_tokens
        owner = walk.steps[-1].node if walk.steps else node
    for position, blob in sorted(put.request.logits.items()):
        if position <= covered:
            digest = PrefixHasher(root.digest, packed).at(position)
            if writer.get(LOGITS, digest) is None:
                holder = match(writer, root.digest, packed[: position * TOKEN_BYTES]).steps[-1].node
                value = pack_logits(digest, holder, blob)
                writer.put(LOGITS, digest, value)
                size_bytes += len(value)
    return PutReport(written, tokens, size_bytes)


def _enter(writer: Writer, put: _Prepared, position: int) -> None:
    """Enter what an attempt that fails would have stored from ``position`` on: the puts after it may meet it."""
    packed = put.request.packed
    digest = PrefixHasher(put.request.root.digest, packed).at(position)
    tokens = packed[position * TOKEN_BYTES : put.spans[-1].payload.end * TOKEN_BYTES]
    attach(writer, digest, tokens, node_id(digest, tokens))


def _logits_of(reader: Reader, node: bytes, record: NodeRecord, prefix: bytes | None) -> list[tuple[bytes, int]]:
    """Return (prefix digest, bytes) of the logits that were stored for positions inside a node."""
    found = []
    if prefix is not None:
        hasher = PrefixHasher(record.root.digest, prefix)
        for position in range(record.start + 1, record.end + 1):
            data = reader.get(LOGITS, digest := hasher.at(position))
            if data is not None:
                found.append((digest, len(data)))
    else:  # the tokens before the node are gone, so its digests cannot be computed: look at all
        for digest, data in reader.scan(LOGITS):
            if logits_owner(data) == node:
                found.append((digest, len(data)))
    return found


def remove_span(writer: Writer, node: bytes, prefix: bytes | None) -> None:
    """Remove one span with its blobs and logits; ``prefix`` is the packed tokens to its end, if they are known."""
    record = Snapshot(writer, Verified("never")).record(node)
    if record is None:
        return
    size_bytes = record.size_bytes
    for kind in record.blobs:
        writer.delete(BLOBS, node + kind.encode())
    for digest, logits_bytes in _logits_of(writer, node, record, prefix):
        size_bytes += logits_bytes
        writer.delete(LOGITS, digest)
    detach(writer, record.child_hash, record.span)
    writer.delete(NODES, node)
    add_to_totals(writer, record.root, -1, -record.num_tokens, -size_bytes)
