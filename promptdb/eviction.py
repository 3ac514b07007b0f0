"""Making room: which spans go when the quota is reached. Leaves first, in the order of an index; nothing is scanned."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from promptdb.errors import CorruptDataError, QuotaExceededError
from promptdb.events import warn
from promptdb.format import QUEUE
from promptdb.ledger import Ledger
from promptdb.life import QUEUE_NODE_AT, expiry_keys, priority_keys, queue_number
from promptdb.pins import drop_expired_pins

# Room beyond what a put needs, so that not every put has to make some; and the most that one put removes for it.
FULL_SHARE = 0.95
LEAST_SHARE = 0.8  # what stays, however much a put writes
MAX_SPARE_NODES = 256
# A disk with so much room, or an eighth of what the store holds if that is more, is not full.
FREE_AGAIN_BYTES = 64 << 20


def keep_quota(ledger: Ledger) -> None:
    """Evict until the store is within its quota again, and somewhat further.

    Raises
    ------
    QuotaExceededError
        What is protected or pinned is larger than the quota; nothing was evicted. (With the policy ``ttl``: what has
        not expired. The transaction must be undone.)
    """
    quota, usage = ledger.limits.quota_bytes, ledger.usage
    if usage.room_bytes and usage.charged_bytes > usage.room_bytes:
        _keep_room(ledger)
    if not quota or usage.charged_bytes <= quota:
        return
    drop_expired_pins(ledger)
    lives = [life for node in ledger.protected if (life := ledger.life(node)) is not None]
    kept_bytes = usage.pinned_bytes + sum(life.size_bytes for life in lives if not life.pinned_unix_s)
    if kept_bytes > quota:
        raise _refusal(ledger, kept_bytes)
    # LMDB uses pages again in the second transaction after the one that freed them. Without room for two more of what
    # has just come, the file grows although much of it is free.
    room_bytes = 2 * max(0, usage.charged_bytes - ledger.begun_bytes)
    goal_bytes = max(int(LEAST_SHARE * quota), min(int(FULL_SHARE * quota), quota - room_bytes))
    evict(ledger, enough_bytes=quota, goal_bytes=goal_bytes)
    if usage.charged_bytes > quota:
        raise _refusal(ledger, usage.charged_bytes)


def _keep_room(ledger: Ledger) -> None:
    """Evict what the disk had no room for, if it is still full: the next put would only fail, and pay for that."""
    room_bytes = ledger.usage.room_bytes
    if ledger.free_bytes() > max(FREE_AGAIN_BYTES, room_bytes // 8):
        ledger.usage.room_bytes = 0
    else:
        evict(ledger, enough_bytes=room_bytes, goal_bytes=int(FULL_SHARE * room_bytes), spare_nodes=4)


def _refusal(ledger: Ledger, kept_bytes: int) -> QuotaExceededError:
    quota, pinned = ledger.limits.quota_bytes, ledger.usage.pinned_bytes
    if kept_bytes - pinned > quota and ledger.limits.policy != "ttl":
        reason = f"the put and what it stands on take {kept_bytes - pinned:,} bytes"
        hint = "raise the quota (`promptdb limits --quota`), or put shorter prompts"
    elif pinned:
        reason = f"{pinned:,} bytes are pinned, and what cannot be evicted takes {kept_bytes:,} bytes in all"
        hint = "take pins off (`promptdb pins`, `promptdb unpin`), or raise the quota (`promptdb limits --quota`)"
    else:
        reason = f"what has not expired takes {kept_bytes:,} bytes, and the policy is ttl"
        hint = "choose another policy (`promptdb limits --policy`), remove spans, or raise the quota"
    return QuotaExceededError(f"the quota is {quota:,} bytes: {reason}; nothing was stored", hint)


def evict(
    ledger: Ledger, *, enough_bytes: int, goal_bytes: int, spare_nodes: int = MAX_SPARE_NODES, max_nodes: int = 1 << 62
) -> int:
    """Remove expired spans, then those of the lowest rank, none of them protected or pinned; return how many.

    Parameters
    ----------
    enough_bytes : go on until the store is charged no more.
    goal_bytes : then go on to this, but remove no more than ``spare_nodes`` for it.
    max_nodes : stop after so many.

    Notes
    -----
    About 60 microseconds a span, whatever the size of the store.
    """
    queue = _Queue(ledger)
    removed = spare = 0
    for node, is_expired in queue.victims():
        charged = ledger.usage.charged_bytes
        if charged <= goal_bytes or (charged <= enough_bytes and spare >= spare_nodes) or removed >= max_nodes:
            break
        spare += charged <= enough_bytes
        removed += queue.remove(node, is_expired=is_expired)
    return removed


def collect_expired(ledger: Ledger, *, max_nodes: int = 1 << 62) -> int:
    """Remove spans that have expired; return how many."""
    queue = _Queue(ledger)
    removed = 0
    for node, is_expired in queue.victims():
        if not is_expired or removed >= max_nodes:
            break
        removed += queue.remove(node, is_expired=True)
    return removed


class _Queue:
    """The queue as it is stored, and beside it the spans that have lost their last child since.

    Entries of nodes that the ledger has changed are written first, but for those that are protected; what is removed
    leaves its entries behind until the ledger is written again, as a table that is read must not change.
    """

    def __init__(self, ledger: Ledger) -> None:
        drop_expired_pins(ledger)
        ledger.write(deferred=ledger.protected)
        self._ledger = ledger
        self._freed: dict[bytes, list[bytes]] = {expiry_keys(): [], priority_keys(): []}

    def victims(self) -> Iterator[tuple[bytes, bool]]:
        """Yield (node, whether it has expired); each must be removed, or passed over, before the next is asked for."""
        for key in self._keys(expiry_keys()):
            if queue_number(key) > self._ledger.now:
                break
            yield key[QUEUE_NODE_AT:], True
        if self._ledger.limits.policy != "ttl":
            for key in self._keys(priority_keys()):
                yield key[QUEUE_NODE_AT:], False

    def _keys(self, prefix: bytes) -> Iterator[bytes]:
        freed, protected = self._freed[prefix], self._ledger.protected
        stored = self._ledger.writer.keys(QUEUE, prefix)
        key = next(stored, b"")
        while True:
            has_stored = bool(key)
            if freed and (not has_stored or freed[0] < key):
                yield heapq.heappop(freed)
            elif has_stored:
                node = key[QUEUE_NODE_AT:]
                if node not in protected and self._ledger.life(node) is not None:
                    yield key
                key = next(stored, b"")
            else:
                return

    def remove(self, node: bytes, *, is_expired: bool) -> bool:
        """Remove a node and count it; what stood below it may be next. Return whether that could be done."""
        ledger, usage = self._ledger, self._ledger.usage
        life = ledger.life(node)
        try:
            if life is None or not ledger.remove(node):
                return False
        except CorruptDataError as error:
            warn("eviction_failed", f"a span cannot be evicted: {error}; `promptdb verify --fix`", node=node.hex())
            return False
        if is_expired:
            usage.num_expired += 1
            usage.expired_bytes += life.size_bytes
        else:
            usage.num_evicted += 1
            usage.evicted_bytes += life.size_bytes
            if ledger.limits.policy == "cost":
                usage.inflation = max(usage.inflation, life.priority)
        parent = ledger.life(life.parent) if life.parent else None
        if parent is not None and life.parent not in ledger.protected:
            for key in parent.queue_keys(life.parent):
                heapq.heappush(self._freed[key[:1]], key)
        return True
