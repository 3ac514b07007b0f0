"""One span as it travels to and from the shared store: an archive of its own, with what it stands on as tokens only.

So a value can be checked by itself, by the code that checks archives: only :mod:`promptdb.incoming` reads one.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

from promptdb.blobs import Blob
from promptdb.db import PromptDB
from promptdb.deposit import Deposit, ImportReport
from promptdb.errors import CorruptDataError
from promptdb.format import LOGITS, TOTALS, BlobEntry, NodeRecord, checksum, pack_record, pack_root
from promptdb.frames import (
    BLOB,
    DONE,
    DONE_KEY,
    LOGITS_AFTER,
    MANIFEST,
    MANIFEST_KEY,
    NODE,
    PATH,
    ROOT,
    VERSION_WITHOUT_ACTIVATIONS,
    Bytes,
    FrameReader,
    FrameWriter,
)
from promptdb.incoming import POSITION_BYTES, ImportOptions, Incoming, logits_bytes, totals
from promptdb.intake import trim
from promptdb.keys import TOKEN_BYTES, PrefixHasher, Root, node_id
from promptdb.outgoing import Outgoing, OutgoingSpan, prefix_of
from promptdb.snapshot import logits_owner


@dataclass(frozen=True)
class Parcel:
    """A span of a prompt with everything that is stored of it.

    Attributes
    ----------
    prefix : packed tokens ``[0, start)`` that it stands on.
    logits : (position, blob) of the logits after positions in (start, end], rising.
    """

    node: bytes
    record: NodeRecord
    prefix: bytes
    blobs: Mapping[str, Blob]
    logits: tuple[tuple[int, Bytes], ...]

    @property
    def root(self) -> Root:
        """The identity that the span was computed with."""
        return self.record.root

    @property
    def packed(self) -> bytes:
        """Packed tokens from position 0 to the end of the span."""
        return self.prefix + self.record.span

    def cut(self, start: int, end: int) -> Parcel:
        """Return the tokens ``[start, end)`` of the span as a span of its own: one copy."""
        record = self.record
        if (start, end) == (record.start, record.end):
            return self
        skip, stop = start - record.start, end - record.start
        packed = self.packed
        child_hash = PrefixHasher(record.root.digest, packed).at(start)
        tokens = packed[start * TOKEN_BYTES : end * TOKEN_BYTES]
        node = node_id(child_hash, tokens)
        blobs = trim(record, self.blobs, skip, stop)
        entries = {kind: BlobEntry(len(blob), checksum(node + kind.encode(), blob)) for kind, blob in blobs.items()}
        compute_s = record.compute_s * (stop - skip) / record.num_tokens
        cut = record._replace(
            child_hash=child_hash, start=start, span=tokens, blobs=entries, compute_s=compute_s, parent=b""
        )
        logits = tuple(each for each in self.logits if start < each[0] <= end)
        return Parcel(node, cut, packed[: start * TOKEN_BYTES], blobs, logits)

    def pack(self) -> bytes:
        """Return the bytes of the archive: one copy."""
        parts = _Parts()
        frames = FrameWriter(cast(BinaryIO, parts))
        root = self.root
        frames.write(MANIFEST, pack_record(MANIFEST_KEY, {"num_namespaces": 1}))
        frames.write(ROOT, root.digest, pack_root(root, dict.fromkeys(TOTALS, 0)))
        if self.prefix:
            frames.write(PATH, self.prefix)
        frames.write(NODE, self.node, self.record.pack(self.node))
        size_bytes = self.record.size_bytes
        for blob in self.blobs.values():
            frames.write(BLOB, blob)
        for position, row in self.logits:
            frames.write(LOGITS_AFTER, position.to_bytes(POSITION_BYTES, "little"), row)
            size_bytes += logits_bytes(row)
        counted = totals(1, 1, self.record.num_tokens, len(self.logits), size_bytes)
        frames.write(DONE, pack_record(DONE_KEY, {**counted, "digest": frames.digest()}))
        return b"".join(parts.parts)


def parcel_of(db: PromptDB, outgoing: Outgoing, span: OutgoingSpan, prefix: bytes) -> Parcel:
    """Return the parcel of a span that was read, and that stands on ``prefix``."""
    found = ((position, outgoing.logits(digest)) for position, digest in span.logits)
    logits = tuple((position, blob) for position, blob in found if blob is not None)
    return Parcel(span.node, span.record, prefix, span.blobs, logits)


def load_parcel(db: PromptDB, node: bytes) -> Parcel:
    """Return the parcel of a stored span.

    Raises
    ------
    NodeNotFoundError, CorruptDataError
        It is gone, damaged, or stands on what is.
    """
    record, packed = prefix_of(db, node)
    outgoing = Outgoing(db, record.root)
    span = next(outgoing.subtree(node, record.start, packed, with_prefix=False))
    return parcel_of(db, outgoing, span, packed[: record.start * TOKEN_BYTES])


def load_logits(db: PromptDB, digest: bytes) -> Parcel | None:
    """Return logits after a prefix as a parcel: with the prefix' last token, as a span of one. None if they are gone.

    Raises
    ------
    NodeNotFoundError, CorruptDataError
        What they stand on is gone or damaged.
    """
    with db.read() as snapshot:
        value = snapshot.reader.get(LOGITS, digest)
        owner = None if value is None else logits_owner(value)
    if owner is None:
        return None
    whole = load_parcel(db, owner)
    hasher = PrefixHasher(whole.root.digest, whole.packed)
    for position, _ in whole.logits:
        if hasher.at(position) == digest:
            return whole.cut(position - 1, position)
    return None


class _Parts:
    """Collects what is written, to be joined once."""

    def __init__(self) -> None:
        self.parts: list[Bytes] = []

    def write(self, data: Bytes) -> None:
        self.parts.append(data)


class _Stream(io.RawIOBase):
    """Reads the pieces of a value without joining them."""

    def __init__(self, pieces: Sequence[Bytes]) -> None:
        self._views = [memoryview(piece) for piece in pieces]
        self._number = self._at = 0

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        while self._number < len(self._views):
            view = self._views[self._number]
            count = min(len(target), len(view) - self._at)
            if count:
                target[:count] = view[self._at : self._at + count]
                self._at += count
                return count
            self._number, self._at = self._number + 1, 0
        return 0


def unpack(pieces: Sequence[Bytes], node: bytes, db: PromptDB, deposit: Deposit) -> ImportReport:
    """Check a value from afar, and hand its span to a deposit.

    Parameters
    ----------
    node : ID of the span that was asked for: of its identity, the tokens before it, and its own. Another is refused.

    Raises
    ------
    CorruptDataError
        It is not that span, or something about it cannot be.
    StoreError
        The local store cannot be written.
    """

    def check_node(found: bytes) -> None:
        if found != node:
            raise CorruptDataError("it is another span than the one that was asked for")

    options = ImportOptions(check_node=check_node)
    frames = FrameReader(cast(BinaryIO, _Stream(pieces)), newest=VERSION_WITHOUT_ACTIVATIONS)
    incoming = Incoming(db, frames, options, lambda num_bytes: None, deposit)
    incoming.run()
    return incoming.report
