"""A lock around the memory map of a store: transactions share it, who changes the map holds it alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from promptdb.errors import StoreError


class MapLock:
    """Readers-writer lock around the memory map: transactions hold it shared, a resize holds it alone.

    A thread that holds it shared may take it again while a resize waits; otherwise the two would wait for each other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        self._depths: dict[int, int] = {}  # by thread; 0 is not kept
        self._resizing = False

    def acquire(self) -> int:
        """Take it shared; return what :meth:`release` wants, from whichever thread it is called."""
        thread = threading.get_ident()
        with self._lock:
            depth = self._depths.get(thread, 0)
            while self._resizing and not depth:
                self._condition.wait()
            self._depths[thread] = depth + 1
        return thread

    def release(self, thread: int) -> None:
        """Let go of what :meth:`acquire` took."""
        with self._lock:
            depth = self._depths.pop(thread) - 1
            if depth:
                self._depths[thread] = depth
            elif self._resizing:
                self._condition.notify_all()

    def is_held(self) -> bool:
        """Return whether this thread holds it shared."""
        return threading.get_ident() in self._depths

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold it shared."""
        thread = self.acquire()
        try:
            yield
        finally:
            self.release(thread)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold it alone, once all others have let go. Raises :class:`StoreError` if this thread holds it shared."""
        if self.is_held():
            raise StoreError("the map cannot change while this thread reads from it", "leave read() first")
        with self._condition:
            while self._resizing:
                self._condition.wait()
            self._resizing = True
            while self._depths:
                self._condition.wait()
        try:
            yield
        finally:
            with self._condition:
                self._resizing = False
                self._condition.notify_all()
