"""Reading nodes, blobs and logits inside one transaction, checked before they are believed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from promptdb.access import AccessLog
from promptdb.blobs import TensorView, parse_blob
from promptdb.errors import CorruptDataError
from promptdb.format import ACTIVATIONS, BLOBS, CHECKSUM_BYTES, LIFE, LOGITS, NODES, NodeRecord, checksum
from promptdb.keys import DIGEST_BYTES, TOKEN_BYTES, PrefixHasher, Root, node_id
from promptdb.life import is_alive
from promptdb.packing import unpack
from promptdb.tables import Reader
from promptdb.trie import KnownSpans, Step, Walk, match

VERIFY_MODES = ("always", "once", "never")

# Records that a snapshot remembers, a few KB each: those of one prompt, while many may be read.
_MOST_RECORDS = 64


class Verified:
    """Which blobs this process has already checked, for the mode ``once``.

    Thread safe. A checksum over a blob costs about as much as reading it, so ``once`` is the default: the first read of
    a blob by a process pays for it, later ones read what is in the page cache already. Bounded: forgets everything
    after a million blobs.
    """

    _MOST = 1_000_000

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._seen: set[bytes] = set()
        self._lock = threading.Lock()

    def holds(self, key: bytes, content: memoryview, expected: bytes) -> bool:
        """Return whether ``content`` under ``key`` has the ``expected`` checksum, or need not be checked."""
        if self.mode == "never":
            return True
        # With the checksum: somebody else may remove a blob and store another under its key.
        seen = key + expected
        if self.mode == "once" and seen in self._seen:
            return True
        if checksum(key, content) != expected:
            return False
        with self._lock:
            if len(self._seen) >= self._MOST:
                self._seen.clear()
            self._seen.add(seen)
        return True


class Match(NamedTuple):
    """What is stored of a prompt: the answer of a lookup.

    Immutable; holds no resources. The spans may be removed by others after the lookup: reading them is then a miss.
    """

    root: Root
    packed: bytes
    steps: tuple[Step, ...]
    num_tokens: int
    has_logits: bool
    is_damaged: bool = False  # the index could not be read: what is stored is not known
    known_digest: bytes = b""

    @property
    def end_digest(self) -> bytes:
        """Prefix digest of the tokens that are stored."""
        return self.known_digest or PrefixHasher(self.root.digest, self.packed).at(self.num_tokens)

    @property
    def is_complete(self) -> bool:
        """Whether the whole prompt is stored, with the logits after its last token: nothing needs to be computed."""
        return self.has_logits and self.num_tokens * TOKEN_BYTES == len(self.packed)


class Snapshot:
    """One consistent view of the store. Belongs to one thread, lives as long as its transaction.

    Views that its methods return point into the store's memory map and die with it: copy before leaving.

    Parameters
    ----------
    accesses : where uses of spans are noted; None: nowhere.
    clock : seconds since 1970; what has expired is not found.
    """

    def __init__(
        self,
        reader: Reader,
        verified: Verified,
        accesses: AccessLog | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.reader = reader
        self._verified = verified
        self._accesses = accesses
        self._clock = clock
        self._records: dict[bytes, tuple[bytes, NodeRecord]] = {}  # read: a load asks for each two or three times

    def match(self, root: Root, packed: bytes, known: KnownSpans | None = None) -> Match:
        """Find the longest stored prefix of a prompt that has not expired; see :func:`promptdb.trie.match`."""
        walk = match(self.reader, root.digest, packed, known=known)
        if not walk.steps:
            return Match(root, packed, (), 0, has_logits=False)
        now, reader = self._clock(), self.reader
        # What a span stands on lives as long as the span: the last one tells of all.
        if not is_alive(reader.get(LIFE, walk.steps[-1].node), now):
            walk = self._alive(walk, root, packed, now)
        if self._accesses is not None and walk.steps:
            self._accesses.touch(walk.steps[-1].node, now)
        has_logits = walk.num_tokens > 0 and reader.size(LOGITS, walk.end_digest) is not None
        return Match(root, packed, walk.steps, walk.num_tokens, has_logits, known_digest=walk.end_digest)

    def _alive(self, walk: Walk, root: Root, packed: bytes, now: float) -> Walk:
        for number, step in enumerate(walk.steps):
            if not is_alive(self.reader.get(LIFE, step.node), now):
                end_digest = PrefixHasher(root.digest, packed).at(step.start)
                return Walk(walk.steps[:number], step.start, end_digest)
        return walk

    def record(self, node: bytes) -> NodeRecord | None:
        """Return the record of a node, or None if it is gone.

        Raises
        ------
        CorruptDataError
            The record fails its checksum, or is not the record of that node.
        """
        found = self.reader.get(NODES, node)
        if found is None:
            return None
        data = bytes(found)
        known = self._records.get(node)
        if known is not None and known[0] == data:  # a writer may see another one the next time
            return known[1]
        record = NodeRecord.unpack(node, data)
        if node_id(record.child_hash, record.span) != node:
            raise CorruptDataError(f"the record under node {node[:8].hex()} belongs to another span")
        if len(self._records) >= _MOST_RECORDS:
            self._records.clear()
        self._records[node] = data, record
        return record

    def blob(self, node: bytes, record: NodeRecord, kind: str) -> dict[str, TensorView] | None:
        """Return views of the tensors of a node's blob, or None if the node has no such blob.

        Raises
        ------
        CorruptDataError
            Size, checksum or header do not hold.
        """
        entry = record.blobs.get(kind)
        key = node + kind.encode()
        if entry is None:
            return None
        data = self.reader.get(BLOBS, key)
        if data is None:
            raise CorruptDataError(f"blob {kind} of node {node[:8].hex()} is missing")
        if len(data) != entry.size_bytes:
            raise CorruptDataError(
                f"blob {kind} of node {node[:8].hex()} has {len(data)} bytes, not {entry.size_bytes}"
            )
        if not self._verified.holds(key, data, entry.checksum):
            raise CorruptDataError(f"the checksum of blob {kind} of node {node[:8].hex()} does not hold")
        return parse_blob(unpack(data))

    def activations(self, key: bytes) -> memoryview | None:
        """Return the blob of recorded activations under a key, or None if there are none.

        Raises
        ------
        CorruptDataError
            The checksum does not hold.
        """
        data = self.reader.get(ACTIVATIONS, key)
        if data is None:
            return None
        content = data[CHECKSUM_BYTES:]
        if not self._verified.holds(key, content, bytes(data[:CHECKSUM_BYTES])):
            raise CorruptDataError(f"the checksum of activations of node {key[:8].hex()} does not hold")
        return content

    def logits(self, prefix_digest: bytes) -> TensorView | None:
        """Return the next-token logits after a prefix, shape ``[vocabulary]``, or None if they are not stored.

        Raises
        ------
        CorruptDataError
            Checksum or header do not hold.
        """
        data = self.reader.get(LOGITS, prefix_digest)
        if data is None:
            return None
        content = data[CHECKSUM_BYTES:]
        if not self._verified.holds(prefix_digest, content, bytes(data[:CHECKSUM_BYTES])):
            raise CorruptDataError(f"the checksum of the logits after {prefix_digest[:8].hex()} does not hold")
        tensors = parse_blob(unpack(content[DIGEST_BYTES:]))
        if "logits" not in tensors:
            raise CorruptDataError(f"no logits in the blob after {prefix_digest[:8].hex()}")
        return tensors["logits"]


def pack_logits(prefix_digest: bytes, owner: bytes, blob: bytes | bytearray | memoryview) -> bytes:
    """Return the value to store under a prefix digest: checksum, ID of the node that holds the position, blob."""
    content = owner + blob
    return checksum(prefix_digest, content) + content


def logits_owner(value: memoryview) -> bytes:
    """Return the ID of the node that stored logits belong to."""
    return bytes(value[CHECKSUM_BYTES : CHECKSUM_BYTES + DIGEST_BYTES])
