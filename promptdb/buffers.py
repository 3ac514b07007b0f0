"""Memory that is used again. Touching fresh memory costs page faults (about 1 GB/s); used memory is 5 to 10 times
faster.

A lease is given back when nobody can reach its bytes any more: every view, a tensor among them, keeps the lease object
alive, and the memory returns to the pool only when that object dies. Nobody can ever see another's bytes change.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from bisect import bisect_left, insort
from collections import deque
from typing import Any

# Huge pages, where the system gives them, make the first touch several times cheaper.
_PAGE_BYTES = 2 << 20


class BufferPool:
    """Leases of anonymous memory, reused by size. Thread safe.

    Parameters
    ----------
    max_idle_bytes : how much unused memory is kept for later leases.
    """

    def __init__(self, max_idle_bytes: int = 1 << 30) -> None:
        self.max_idle_bytes = max_idle_bytes
        self._idle: list[mmap.mmap] = []  # from the smallest to the largest
        self._idle_bytes = 0
        # Finalisers run at any point of any thread, even while this one holds the lock: they only append.
        self._returned: deque[mmap.mmap] = deque()
        self._lock = threading.Lock()

    def lease(self, size_bytes: int) -> Any:
        """Return a writable object with the buffer protocol, of exactly ``size_bytes``, with undefined content.

        The memory belongs to whoever holds the object or a view of it.
        """
        size_bytes = max(size_bytes, 1)
        memory = self._take(size_bytes)
        lease = (ctypes.c_char * size_bytes).from_buffer(memory)
        weakref.finalize(lease, self._returned.append, memory).atexit = False
        return lease

    def _take(self, size_bytes: int) -> mmap.mmap:
        with self._lock:
            self._sort_in()
            position = bisect_left(self._idle, size_bytes, key=len)
            # A buffer far larger than asked for is left to those who need it.
            if position < len(self._idle) and len(self._idle[position]) <= 4 * size_bytes + _PAGE_BYTES:
                memory = self._idle.pop(position)
                self._idle_bytes -= len(memory)
                return memory
        length = -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES
        # Private: mmap's default would share the memory, and so every cache in it, with forked children.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, length, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def _sort_in(self) -> None:
        """Take over what was given back; of too much, the smallest go."""
        while self._returned:
            memory = self._returned.popleft()
            insort(self._idle, memory, key=len)
            self._idle_bytes += len(memory)
        while self._idle_bytes > self.max_idle_bytes:
            self._idle_bytes -= len(self._idle.pop(0))

    def after_fork(self) -> None:
        """Start anew in a forked child: another thread may have held the lock, or been moving buffers."""
        self._lock = threading.Lock()
        self._idle, self._idle_bytes, self._returned = [], 0, deque()

    def idle_bytes(self) -> int:
        """Return how much memory waits for its next use."""
        with self._lock:
            return self._idle_bytes + sum(map(len, list(self._returned)))


class Slab:
    """Copies of small things, several of them in one lease: fresh memory for each would cost page faults for each.

    Not thread safe. A copy keeps all of its lease alive, so that whoever keeps one keeps up to ``lease_bytes``.
    """

    _ALIGNMENT_BYTES = 64

    def __init__(self, pool: BufferPool, lease_bytes: int = 4 << 20) -> None:
        self._pool, self._lease_bytes = pool, lease_bytes
        self._rest = memoryview(bytearray())

    def copy(self, data: memoryview) -> memoryview:
        """Return a writable copy of bytes."""
        room_bytes = -(-len(data) // self._ALIGNMENT_BYTES) * self._ALIGNMENT_BYTES
        if room_bytes > len(self._rest):
            self._rest = memoryview(self._pool.lease(max(room_bytes, self._lease_bytes))).cast("B")
        copied, self._rest = self._rest[: len(data)], self._rest[room_bytes:]
        copied[:] = data
        return copied


POOL = BufferPool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=POOL.after_fork)
