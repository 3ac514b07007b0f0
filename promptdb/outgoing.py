"""Walking the spans of a store in the order of an archive, each read, checked and ready to be written."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

from promptdb.activations import cut_entry, read_entry
from promptdb.blobs import Blob
from promptdb.db import PromptDB
from promptdb.errors import CorruptDataError, NodeNotFoundError
from promptdb.format import ACTIVATIONS, CHILDREN, KV_BLOB, LOGITS, LOGPROBS_BLOB, BlobEntry, NodeRecord, checksum
from promptdb.intake import check_activations, check_blobs, check_logits, check_record, own_logits, own_tensors
from promptdb.keys import DIGEST_BYTES, TOKEN_BYTES, PrefixHasher, Root
from promptdb.snapshot import Snapshot
from promptdb.trie import descendants


@dataclass(frozen=True)
class OutgoingSpan:
    """A span that was read: its record, of the blobs as they are here, and where there are logits.

    ``logits`` has (position, prefix digest) of the places inside the span after which logits are stored, rising.
    """

    node: bytes
    record: NodeRecord
    blobs: dict[str, Blob]
    logits: list[tuple[int, bytes]]


class Outgoing:
    """Walks spans of one root, all or ``only`` those of a set, which holds what they stand on too.

    ``num_damaged`` counts those left out because they do not hold, whatever stands on them not included.

    Every span is read in a snapshot of its own, so that a slow receiver keeps no old pages of the store in use: what
    others put or remove meanwhile may be seen or not. Not thread safe.
    """

    def __init__(self, db: PromptDB, root: Root, *, only: Set[bytes] | None = None) -> None:
        self._db = db
        self._root = root
        self._only = only
        self.num_damaged = self.num_damaged_entries = 0

    def everything(self) -> Iterator[OutgoingSpan]:
        """Yield every span that can be reached from the root."""
        start = PrefixHasher(self._root.digest, b"").at(0)
        return self._walk(bytearray(), [(0, start)])

    def subtree(self, node: bytes, start: int, prefix: bytes, *, with_prefix: bool) -> Iterator[OutgoingSpan]:
        """Yield the spans that a span stands on, if asked for, then the span, and all that stands on it.

        Parameters
        ----------
        node : ID of the span, which begins at position ``start``.
        prefix : packed tokens from position 0 to its end.

        Raises
        ------
        CorruptDataError
            One of the spans that it stands on, or the span itself, is damaged or was removed just now.
        """
        before = prefix[: start * TOKEN_BYTES]
        with self._db.read() as snapshot:
            match = snapshot.match(self._root, before)
        if match.num_tokens < start:
            raise CorruptDataError(f"span {node.hex()[:12]} stands on spans that cannot be found", "`promptdb verify`")
        path = [(step.node, step.start) for step in match.steps] if with_prefix else []
        for each, at in [*path, (node, start)]:
            with self._db.read() as snapshot:
                span = self._read(snapshot, each, prefix[: at * TOKEN_BYTES])
            if span is None:
                raise CorruptDataError(f"span {each.hex()[:12]} was removed just now", "export again")
            yield span
        yield from self._walk(bytearray(prefix), self._attached(start, prefix))

    def logits(self, digest: bytes) -> Blob | None:
        """Return the blob of the logits after a prefix, or None if they are gone or damaged."""
        with self._db.read() as snapshot:
            try:
                view = snapshot.logits(digest)
                if view is None:
                    return None
                blob = own_logits(view)
                check_logits(blob)
            except CorruptDataError:
                return None
        return blob

    def activations(self, span: OutgoingSpan) -> Iterator[tuple[bytes, Blob]]:
        """Yield what is recorded of a span: the key of each entry without the node ID, and its blob.

        Each is read in a snapshot of its own. Damaged ones are left out, and counted in ``num_damaged_entries``.
        """
        with self._db.read() as snapshot:
            names = [key[DIGEST_BYTES:] for key in snapshot.reader.keys(ACTIVATIONS, span.node)]
        for name in names:
            try:
                with self._db.read() as snapshot:
                    content = snapshot.activations(span.node + name)
                    if content is None:
                        continue
                    entry = read_entry(content)
                    blob = cut_entry(entry, 0, entry.num_rows, 0)
                check_activations(span.record, name, blob)
            except CorruptDataError:
                self.num_damaged_entries += 1
                continue
            yield name, blob

    def _walk(self, tokens: bytearray, places: list[tuple[int, bytes]]) -> Iterator[OutgoingSpan]:
        """Yield what stands on the tokens at some places, depth first, what attaches last first.

        Whoever reads that order needs the tokens of the last span, and those before it, but of no others.
        """
        levels = [_Level(places)]
        while levels:
            level = levels[-1]
            if not level.places:
                levels.pop()
                continue
            position = level.places[-1][0]
            span = self._next(level, bytes(tokens[: position * TOKEN_BYTES]))
            if span is None:
                level.leave_place()
                continue
            tokens[position * TOKEN_BYTES :] = span.record.span
            yield span
            levels.append(_Level(self._attached(position, bytes(tokens))))

    def _next(self, level: _Level, prefix: bytes) -> OutgoingSpan | None:
        """Return the next span that holds at the last place of a level, or None if there is none."""
        if level.waiting is None:
            with self._db.read() as snapshot:
                level.waiting = list(snapshot.reader.keys(CHILDREN, level.places[-1][1]))[::-1]
        while level.waiting:
            with self._db.read() as snapshot:
                entry = snapshot.reader.get(CHILDREN, level.waiting.pop())
                node = b"" if entry is None else bytes(entry[:DIGEST_BYTES])
                if not node or (self._only is not None and node not in self._only):
                    continue
                try:
                    span = self._read(snapshot, node, prefix)
                except CorruptDataError:
                    self.num_damaged += 1
                    continue
                if span is not None:
                    return span
        return None

    def _read(self, snapshot: Snapshot, node: bytes, prefix: bytes) -> OutgoingSpan | None:
        """Read the span that goes on after a prefix, or return None if it is gone."""
        record = snapshot.record(node)
        if record is None:
            return None
        start = len(prefix) // TOKEN_BYTES
        hasher = PrefixHasher(self._root.digest, prefix + record.span)
        if (record.root, record.start, record.child_hash) != (self._root, start, hasher.at(start)):
            raise CorruptDataError(f"span {node.hex()[:12]} is not what its place says")
        blobs = {}
        for kind in (KV_BLOB, LOGPROBS_BLOB):
            tensors = snapshot.blob(node, record, kind)
            if tensors is None:
                raise CorruptDataError(f"span {node.hex()[:12]} was stored without {kind}")
            blobs[kind] = own_tensors(record, kind, tensors)
        entries = {kind: BlobEntry(len(blob), checksum(node + kind.encode(), blob)) for kind, blob in blobs.items()}
        record = record._replace(blobs=entries)
        check_record(record)
        check_blobs(record, blobs)
        ends = ((position, hasher.at(position)) for position in range(start + 1, record.end + 1))
        logits = [(position, digest) for position, digest in ends if snapshot.reader.size(LOGITS, digest) is not None]
        return OutgoingSpan(node, record, blobs, logits)

    def _attached(self, start: int, packed: bytes) -> list[tuple[int, bytes]]:
        """Return (position, prefix digest), rising, where spans stand on the tokens from ``start`` on."""
        hasher = PrefixHasher(self._root.digest, packed)
        found = []
        with self._db.read() as snapshot:
            for position in range(start + 1, len(packed) // TOKEN_BYTES + 1):
                digest = hasher.at(position)
                if next(snapshot.reader.keys(CHILDREN, digest), None) is not None:
                    found.append((position, digest))
        return found


class _Level:
    """Places where spans attach, of which the last is worked on.

    ``waiting`` has the keys of the child index that are left there, the next one last; None before they are read.
    """

    def __init__(self, places: list[tuple[int, bytes]]) -> None:
        self.places = list(places)
        self.waiting: list[bytes] | None = None

    def leave_place(self) -> None:
        self.places.pop()
        self.waiting = None


def prefix_of(db: PromptDB, node: bytes) -> tuple[NodeRecord, bytes]:
    """Return the record of a span, and its packed tokens from position 0 to its end.

    Raises
    ------
    NodeNotFoundError
        There is no such span, or it stands on one that was removed.
    """
    with db.read() as snapshot:
        record = snapshot.record(node)
        if record is None:
            raise NodeNotFoundError(f"no node {node.hex()}", "`promptdb ls` lists them")
        prefix = db.prefix(snapshot, record)
        if prefix is None:
            # The span that it was put on is gone, but others may have taken that one's place: look at all.
            reachable = descendants(snapshot.reader, record.root.digest, b"", -1)
            prefix = next((tokens for _, each, tokens in reachable if each == node), None)
    if prefix is None:
        raise NodeNotFoundError(
            f"span {node.hex()[:12]} stands on spans that were removed", "it is found again once those are stored again"
        )
    return record, prefix
