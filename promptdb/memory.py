"""Tables in memory, for stores that die with their process. Same contract as LMDB; used as its oracle in tests."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from promptdb.errors import StoreError
from promptdb.format import TABLES
from promptdb.tables import Item, Reader, Reading, Result, Writer


class _Table:
    """Sorted keys beside a dict. Inserting is O(n) in theory and a short memmove in practice."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.keys: list[bytes] = []

    def put(self, key: bytes, value: bytes) -> None:
        if key not in self.values:
            insort(self.keys, key)
        self.values[key] = value

    def delete(self, key: bytes) -> bool:
        if self.values.pop(key, None) is None:
            return False
        del self.keys[bisect_left(self.keys, key)]
        return True


class MemoryIndex:
    """Tables in memory.

    Thread safe. Readers and the writer exclude each other, which is simpler than snapshots and, where nothing waits for
    a disk, as good.
    """

    readonly = False

    def __init__(self) -> None:
        self._tables = {name: _Table() for name in TABLES}
        self._lock = threading.RLock()
        self._depth = 0
        self._closed = False

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the store in memory is closed", "its content is gone; open another")

    @contextmanager
    def read(self) -> Iterator[Reader]:
        """Hold a snapshot."""
        with self._lock:
            self._check_open()
            self._depth += 1
            try:
                yield _MemoryTransaction(self._tables)
            finally:
                self._depth -= 1

    def transact(self, work: Callable[[Writer], Result], *, frees: bool = False) -> Result:
        """Run ``work``; undo its writes if it raises."""
        with self._lock:
            self._check_open()
            if self._depth:  # only this thread can be inside: others would not have let it in
                raise StoreError("a thread cannot write while it reads", "leave read() first")
            self._depth += 1
            transaction = _MemoryTransaction(self._tables)
            try:
                return work(transaction)
            except BaseException:
                transaction.undo()
                raise
            finally:
                self._depth -= 1

    def stats(self) -> dict[str, int]:
        """Return the bytes held in values and keys."""
        with self._lock:
            self._check_open()
            held = sum(len(key) + len(value) for table in self._tables.values() for key, value in table.values.items())
        return {"file_bytes": held, "map_bytes": held}

    def readings(self) -> tuple[int, list[Reading]]:
        """Return that nobody else can hold a snapshot."""
        return 0, []

    def copy(self, path: Path, *, compact: bool = False) -> None:
        """Refuse: there is no file to copy."""
        raise StoreError("a store in memory has no file to copy", "`promptdb.archive.export_nodes` writes an archive")

    def compact(self, check: Callable[[Reader], None]) -> None:
        """Do nothing but check: memory is given back at once."""
        with self._lock:
            if self._depth:
                raise StoreError("the map cannot change while this thread reads from it", "leave read() first")
            with self.read() as reader:
                check(reader)

    def close(self) -> None:
        """Drop everything."""
        with self._lock:
            if self._depth:
                raise StoreError("the map cannot change while this thread reads from it", "leave read() first")
            self._closed = True
            self._tables = {}


class _MemoryTransaction:
    def __init__(self, tables: dict[str, _Table]) -> None:
        self._tables = tables
        self._before: list[tuple[str, bytes, bytes | None]] = []

    def get(self, table: str, key: bytes) -> memoryview | None:
        value = self._tables[table].values.get(key)
        return None if value is None else memoryview(value)

    def size(self, table: str, key: bytes) -> int | None:
        value = self._tables[table].values.get(key)
        return None if value is None else len(value)

    def scan(self, table: str, start: bytes = b"", prefix: bytes = b"") -> Iterator[Item]:
        keys, values = self._tables[table].keys, self._tables[table].values
        for at in range(bisect_left(keys, max(start, prefix)), len(keys)):
            if not keys[at].startswith(prefix):
                return
            yield keys[at], memoryview(values[keys[at]])

    def keys(self, table: str, prefix: bytes = b"") -> Iterator[bytes]:
        return (key for key, _ in self.scan(table, prefix=prefix))

    def count(self, table: str) -> int:
        return len(self._tables[table].keys)

    def stored_sizes(self, table: str, key_bytes: int, value_bytes: int) -> tuple[int, int]:
        return key_bytes, value_bytes

    def put(self, table: str, key: bytes, value: bytes | bytearray | memoryview) -> None:
        self._before.append((table, key, self._tables[table].values.get(key)))
        self._tables[table].put(key, bytes(value))

    def delete(self, table: str, key: bytes) -> bool:
        self._before.append((table, key, self._tables[table].values.get(key)))
        return self._tables[table].delete(key)

    def undo(self) -> None:
        for table, key, value in reversed(self._before):
            if value is None:
                self._tables[table].delete(key)
            else:
                self._tables[table].put(key, value)
