"""The accounting of one write transaction: who stands on whom, what is charged, when what may go.

All that a transaction changes of ``life``, ``queue`` and the totals is collected here and written once, at its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from promptdb.errors import CorruptDataError
from promptdb.events import warn
from promptdb.format import (
    ACTIVATIONS,
    BLOBS,
    CHILDREN,
    LIFE,
    LOGITS,
    NODES,
    QUEUE,
    ROOTS,
    TOTALS,
    NodeRecord,
    pack_root,
    unpack_root,
)
from promptdb.keys import DIGEST_BYTES, Root, child_key, node_id
from promptdb.labels import PIN, read_labels
from promptdb.life import NEVER, Life, priority, read_limits, read_usage
from promptdb.rebuild import activations_charge, logits_charge, record_charge, saved_seconds, upgrade
from promptdb.snapshot import logits_owner
from promptdb.tables import Index, Reader, Writer
from promptdb.trie import detach

Result = TypeVar("Result")

# A use this soon after the last one that is known is not written: what counts is which spans have been idle for long.
COARSE_S = 60.0
NO_END_BYTES = 1 << 62


@dataclass(slots=True)
class _Held:
    life: Life | None  # None: there is none, or the node was removed
    keys: tuple[bytes, ...]  # of the node, in the queue as it is stored
    is_changed: bool


def with_ledger(index: Index, now: float, work: Callable[[Ledger], Result], *, frees: bool = True) -> Result:
    """Run ``work`` in a write transaction and write its ledger at the end.

    With ``frees``, it may use the space that is kept for a full disk.
    """

    def transaction(writer: Writer) -> Result:
        ledger = Ledger(writer, now, lambda: index.stats().get("free_bytes", NO_END_BYTES))
        result = work(ledger)
        ledger.write()
        return result

    return index.transact(transaction, frees=True) if frees else index.transact(transaction)


class Ledger:
    """Accounting of one transaction. Belongs to it, and to its thread.

    Parameters
    ----------
    writer : the transaction. If the totals of the store are gone, its accounting is made again.
    now : seconds since 1970.
    free_bytes : returns what is free on the disk.

    Attributes
    ----------
    usage, limits : the store's totals and settings.
    begun_bytes : what was charged when the transaction began.
    protected : nodes that must not be evicted now: what the transaction has stored, and what it stands on.
    """

    def __init__(self, writer: Writer, now: float, free_bytes: Callable[[], int] = lambda: NO_END_BYTES) -> None:
        self.writer, self.now, self.free_bytes = writer, now, free_bytes
        self.protected: set[bytes] = set()
        self.limits = read_limits(writer)
        self.reload()

    def reload(self) -> None:
        """Forget what was not written, and read the totals again: the store was repaired."""
        usage = read_usage(self.writer)
        self.usage = upgrade(self.writer) if usage is None else usage
        self.begun_bytes = self.usage.charged_bytes
        self._written_usage = replace(self.usage)
        self._held: dict[bytes, _Held] = {}
        self._totals: dict[Root, Counter[str]] = {}

    # What is known of a node

    def _hold(self, node: bytes) -> _Held:
        held = self._held.get(node)
        if held is None:
            data, life = self.writer.get(LIFE, node), None
            if data is not None:
                try:
                    life = Life.unpack(node, data)
                except CorruptDataError as error:
                    warn("life_damaged", str(error), node=node.hex())
            held = self._held[node] = _Held(life, () if life is None else life.queue_keys(node), is_changed=False)
        return held

    def life(self, node: bytes) -> Life | None:
        """Return the entry of a node, not to be changed, or None if it has none that holds. No node has an empty ID."""
        return self._hold(node).life if node else None

    def edit(self, node: bytes) -> Life | None:
        """Return the entry of a node, to be changed, or None if it has none that holds."""
        held = self._hold(node)
        held.is_changed = held.is_changed or held.life is not None
        return held.life

    def path(self, node: bytes) -> Iterator[bytes]:
        """Yield a node and what it stands on, down to the start of the prompt or to where a span is gone."""
        while (life := self.life(node)) is not None:
            yield node
            node = life.parent

    # Changes

    def add(self, node: bytes, record: NodeRecord, record_bytes: int, expires_unix_s: float) -> None:
        """Enter a node whose record, blobs and index entry are being stored; ``record.parent`` is what it stands on."""
        before = self._hold(node)
        if before.life is not None:  # what damage has left of it
            self.usage.charged_bytes -= before.life.size_bytes
            self.usage.pinned_bytes -= before.life.size_bytes if before.life.pinned_unix_s else 0
        size_bytes, created = record_charge(self.writer, record, record_bytes), record.created_unix_s
        life = Life(
            record.parent, 0, size_bytes, expires_unix_s, 0.0, self.now, 0.0, saved_seconds(record), created
        )  # fmt: skip
        life.priority = priority(self.limits.policy, life, self.usage.inflation)
        self._held[node] = _Held(life, before.keys, is_changed=True)
        self.usage.charged_bytes += size_bytes
        self._count(record.root, num_nodes=1, num_tokens=record.num_tokens, blob_bytes=record.size_bytes)
        self.protected.add(node)
        if record.parent:
            self._attach(record.parent)
            self.extend(record.parent, expires_unix_s)
        if self.usage.next_pin_unix_s < NEVER:
            ends = [label.expires_unix_s for label in read_labels(self.writer, PIN, node)]
            if ends:
                self.pin(node, max(ends))

    def _attach(self, parent: bytes) -> None:
        life = self.edit(parent)
        if life is None:
            self.usage.num_orphans += 1
        else:
            life.num_children += 1

    def adopt(self, node: bytes, child: bytes) -> None:
        """Let a node whose parent was gone stand on ``node``, which has taken that one's place."""
        life, parent = self.life(child), self.edit(node)
        if life is None or parent is None or (life.parent != node and self.life(life.parent) is not None):
            return
        self._hold(child).is_changed = True
        life.parent = node
        parent.num_children += 1
        self.usage.num_orphans = max(0, self.usage.num_orphans - 1)
        self.extend(node, life.expires_unix_s)
        self.pin(node, life.pinned_unix_s)

    def add_logits(self, root: Root, owner: bytes, digest: bytes, value_bytes: int) -> None:
        """Enter logits that are being stored under ``digest`` and go with the node ``owner``."""
        life = self.edit(owner)
        if life is not None:
            life.logits.append(digest)
            self._resize(life, logits_charge(self.writer, value_bytes))
        self._count(root, blob_bytes=value_bytes)

    def remove_logits(self, root: Root, digest: bytes) -> bool:
        """Remove logits; return whether they were stored."""
        data = self.writer.get(LOGITS, digest)
        if data is None:
            return False
        size_bytes = self.writer.size(LOGITS, digest) or 0
        life = self.edit(self._holder(digest, logits_owner(data)))
        if life is not None and digest in life.logits:
            life.logits.remove(digest)
            self._resize(life, -logits_charge(self.writer, size_bytes))
        self.writer.delete(LOGITS, digest)
        self._count(root, blob_bytes=-size_bytes)
        return True

    def _holder(self, digest: bytes, owner: bytes) -> bytes:
        """Return the node that logits go with: their owner, unless its ID was damaged. Then all nodes are looked at."""
        life = self.life(owner)
        if life is not None and digest in life.logits:
            return owner
        nodes = list(self.writer.keys(LIFE))
        return next((node for node in nodes if (each := self.life(node)) is not None and digest in each.logits), owner)

    def put_activations(self, root: Root, owner: bytes, key: bytes, value: bytes | bytearray | memoryview) -> None:
        """Store recorded activations of the node ``owner``, in place of what stood under the key."""
        standing = self.writer.get(ACTIVATIONS, key)
        held_bytes = 0 if standing is None else len(standing)
        grown = activations_charge(self.writer, len(key), len(value))
        if standing is not None:
            grown -= activations_charge(self.writer, len(key), held_bytes)
        self.writer.put(ACTIVATIONS, key, value)
        life = self.edit(owner)
        if life is not None:
            self._resize(life, grown)
        self._count(root, blob_bytes=len(value) - held_bytes)

    def remove_activations(self, root: Root, owner: bytes, keys: Iterable[bytes]) -> int:
        """Remove recorded activations of the node ``owner``, which stays; return how many entries were there."""
        removed = 0
        for key in keys:
            standing = self.writer.get(ACTIVATIONS, key)
            if standing is None:
                continue
            size_bytes, life = len(standing), self.edit(owner)
            if life is not None:
                self._resize(life, -activations_charge(self.writer, len(key), size_bytes))
            self.writer.delete(ACTIVATIONS, key)
            self._count(root, blob_bytes=-size_bytes)
            removed += 1
        return removed

    def _resize(self, life: Life, size_bytes: int) -> None:
        life.size_bytes += size_bytes
        self.usage.charged_bytes += size_bytes
        if life.pinned_unix_s:
            self.usage.pinned_bytes += size_bytes

    def remove(self, node: bytes) -> bool:
        """Remove a node and all that goes with it; return whether it was there. What stands on it becomes orphaned.

        Raises
        ------
        CorruptDataError
            Its record does not hold, so that nobody knows what belongs to it.
        """
        data = self.writer.get(NODES, node)
        if data is None:
            return False
        record = NodeRecord.unpack(node, data)
        if node_id(record.child_hash, record.span) != node:
            raise CorruptDataError(f"the record under node {node[:8].hex()} belongs to another span")
        size_bytes = record.size_bytes
        for kind in record.blobs:
            self.writer.delete(BLOBS, node + kind.encode())
        life = self.life(node)
        for digest in self._logits_of(node) if life is None else life.logits:
            value_bytes = self.writer.size(LOGITS, digest)
            if value_bytes is not None:
                size_bytes += value_bytes
                self.writer.delete(LOGITS, digest)
        for key, value_bytes in activations_of(self.writer, node):
            size_bytes += value_bytes
            self.writer.delete(ACTIVATIONS, key)
        entry = self.writer.get(CHILDREN, child_key(record.child_hash, record.span))
        if entry is not None and bytes(entry[:DIGEST_BYTES]) == node:
            detach(self.writer, record.child_hash, record.span)
        self.writer.delete(NODES, node)
        self._count(record.root, num_nodes=-1, num_tokens=-record.num_tokens, blob_bytes=-size_bytes)
        if life is not None:
            self._forget(node, life)
        return True

    def _logits_of(self, node: bytes) -> list[bytes]:
        return [digest for digest, value in self.writer.scan(LOGITS) if logits_owner(value) == node]

    def _forget(self, node: bytes, life: Life) -> None:
        held = self._held[node]
        held.life, held.is_changed = None, True
        self.protected.discard(node)
        self.usage.charged_bytes -= life.size_bytes
        if life.pinned_unix_s:
            self.usage.pinned_bytes -= life.size_bytes
        self.usage.num_orphans += life.num_children
        if not life.parent:
            return
        parent = self.edit(life.parent)
        if parent is None:
            self.usage.num_orphans = max(0, self.usage.num_orphans - 1)
            return
        parent.num_children = max(0, parent.num_children - 1)
        # A use of the child was one of the parent, whether it was written there or not.
        parent.used_unix_s = max(parent.used_unix_s, life.used_unix_s)
        if self.limits.policy == "lru":
            parent.priority = parent.used_unix_s

    def extend(self, node: bytes, expires_unix_s: float) -> None:
        """Let a node, and what it stands on, expire no earlier."""
        while (life := self.life(node)) is not None and life.expires_unix_s < expires_unix_s:
            self._held[node].is_changed = True
            life.expires_unix_s = expires_unix_s
            node = life.parent

    def pin(self, node: bytes, until_unix_s: float) -> None:
        """Let a node, and what it stands on, be pinned no shorter."""
        while (life := self.life(node)) is not None and life.pinned_unix_s < until_unix_s:
            self.set_pinned(node, until_unix_s)
            node = life.parent

    def set_pinned(self, node: bytes, until_unix_s: float) -> None:
        """Set when the last pin on a node ends; 0: there is none."""
        life = self.edit(node)
        if life is None:
            return
        was_pinned, life.pinned_unix_s = bool(life.pinned_unix_s), until_unix_s
        self.usage.pinned_bytes += life.size_bytes * (bool(until_unix_s) - was_pinned)

    def touch(self, used: Mapping[bytes, float]) -> None:
        """Note uses, by node and time, of nodes and all that they stand on."""
        for end, used_unix_s in sorted(used.items(), key=lambda item: -item[1]):  # the last use of a node counts
            for node in self.path(end):
                held = self._held[node]
                life = held.life
                if life is not None and used_unix_s >= life.used_unix_s + COARSE_S:
                    held.is_changed = True
                    life.used_unix_s = used_unix_s
                    life.priority = priority(self.limits.policy, life, self.usage.inflation)

    def rank_again(self, node: bytes) -> None:
        """Give a node its rank under a policy that is new."""
        life = self.edit(node)
        if life is not None:
            life.priority = priority(self.limits.policy, life, self.usage.inflation)

    def _count(self, root: Root, **amounts: int) -> None:
        self._totals.setdefault(root, Counter()).update(amounts)

    # Ending

    def write(self, *, deferred: set[bytes] | frozenset[bytes] = frozenset()) -> None:
        """Write what has changed; of the nodes ``deferred``, later."""
        for node, held in self._held.items():
            if not held.is_changed or node in deferred:
                continue
            keys = () if held.life is None else held.life.queue_keys(node)
            for key in held.keys:
                if key not in keys:
                    self.writer.delete(QUEUE, key)
            for key in keys:
                if key not in held.keys:
                    self.writer.put(QUEUE, key, b"")
            if held.life is None:
                self.writer.delete(LIFE, node)
            else:
                self.writer.put(LIFE, node, held.life.pack(node))
            held.keys, held.is_changed = keys, False
        for root, amounts in self._totals.items():
            add_to_totals(self.writer, root, amounts)
        self._totals.clear()
        if self.usage != self._written_usage:
            self.usage.write(self.writer)
            self._written_usage = replace(self.usage)


def activations_of(reader: Reader, node: bytes) -> list[tuple[bytes, int]]:
    """Return (key, bytes of the value) of all recorded activations of a node."""
    return [(key, reader.size(ACTIVATIONS, key) or 0) for key in reader.keys(ACTIVATIONS, node)]


def add_to_totals(writer: Writer, root: Root, amounts: Counter[str]) -> None:
    """Change the totals of a root, which goes when its last span does."""
    if not any(amounts.values()):
        return
    data = writer.get(ROOTS, root.digest)
    totals = dict.fromkeys(TOTALS, 0) if data is None else unpack_root(root.digest, data)[1]
    for name in TOTALS:
        totals[name] += amounts[name]
    if totals["num_nodes"]:
        writer.put(ROOTS, root.digest, pack_root(root, totals))
    else:
        writer.delete(ROOTS, root.digest)
