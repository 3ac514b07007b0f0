"""What a put and a removal do inside their transaction."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from promptdb.tables import Reader, Writer
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
class PutReport:
    """What a put did: spans and tokens that were new, and bytes written for them."""

    num_spans: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_dropped: int = 0  # spans whose prefix somebody removed meanwhile: they would never be found


class OverlapError(Exception):
    """Somebody stored a part of the first span meanwhile: encode again from ``position``."""

    def __init__(self, position: int) -> None:
        self.position = position


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


def put_spans(
    writer: Writer,
    root: Root,
    packed: bytes,
    spans: Sequence[SpanPayload],
    logits: Mapping[int, Bytes],
    checksums: dict[tuple[int, str], bytes],
) -> PutReport:
    """Store what is not stored yet, and say how much that was; see :meth:`promptdb.PromptDB.put`."""
    walk = match(writer, root.digest, packed)
    covered = walk.num_tokens
    owner = walk.steps[-1].node if walk.steps else b""
    written = tokens = size_bytes = 0
    hasher = PrefixHasher(root.digest, packed)
    for position, span in enumerate(spans):
        if span.end <= covered:
            continue
        if span.start < covered:
            raise OverlapError(covered)
        if span.start > covered:
            return _finish(writer, root, PutReport(written, tokens, size_bytes, len(spans) - position))
        child_hash = hasher.at(span.start)
        ids = packed[span.start * TOKEN_BYTES : span.end * TOKEN_BYTES]
        node = node_id(child_hash, ids)
        entries = {}
        for kind, blob in span.blobs.items():
            key = node + kind.encode()
            # The transaction may run twice, when the map has to grow: the checksum is computed once.
            if (span.start, kind) not in checksums:
                checksums[span.start, kind] = checksum(key, blob)
            entries[kind] = BlobEntry(len(blob), checksums[span.start, kind])
            writer.put(BLOBS, key, blob)
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
    for position, blob in sorted(logits.items()):
        if position <= covered:
            digest = PrefixHasher(root.digest, packed).at(position)
            if writer.get(LOGITS, digest) is None:
                holder = match(writer, root.digest, packed[: position * TOKEN_BYTES]).steps[-1].node
                value = pack_logits(digest, holder, blob)
                writer.put(LOGITS, digest, value)
                size_bytes += len(value)
    return _finish(writer, root, PutReport(written, tokens, size_bytes))


def _finish(writer: Writer, root: Root, report: PutReport) -> PutReport:
    if report.num_spans or report.num_bytes:
        add_to_totals(writer, root, report.num_spans, report.num_tokens, report.num_bytes)
    return report


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
