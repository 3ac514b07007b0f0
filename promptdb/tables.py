"""What the trie and the database need of a storage engine: ordered tables of bytes, and transactions.

Two implementations stand beside each other: :mod:`promptdb.index` (LMDB, on disk) and :mod:`promptdb.memory` (dicts,
for stores that die with their process). One contract suite, :mod:`promptdb.testing`, runs on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

Result = TypeVar("Result")

MAX_KEY_BYTES = 479
"""LMDB takes keys of 511 bytes, and one that is encrypted is up to 32 bytes longer."""

# A view's bytes are valid until the transaction that returned it ends; whoever keeps them must copy them before.
Item = tuple[bytes, memoryview]


class Reading(NamedTuple):
    """A slot for snapshots: the process that has it, and the transaction after which its snapshot was taken; -1 if it
    holds none at this moment."""

    pid: int
    transaction: int


class Reader(Protocol):
    """A consistent snapshot of all tables. Belongs to one thread."""

    def get(self, table: str, key: bytes) -> memoryview | None:
        """Return the value under ``key``, or None. One that was damaged may be returned empty."""

    def size(self, table: str, key: bytes) -> int | None:
        """Return the length of the value under ``key`` without reading it, or None."""

    def scan(self, table: str, start: bytes = b"", prefix: bytes = b"") -> Iterator[Item]:
        """Yield items from ``start`` on whose keys begin with ``prefix``, in the order of the keys' bytes.

        The table must not be written meanwhile. Whoever wants one group of keys names it as ``prefix``: an index need
        not keep keys of different groups in their order, and then has to sort them.
        """

    def keys(self, table: str, prefix: bytes = b"") -> Iterator[bytes]:
        """Yield the keys that begin with ``prefix`` as :meth:`scan` does, without reading values."""

    def count(self, table: str) -> int:
        """Return how many items the table has."""

    def stored_sizes(self, table: str, key_bytes: int, value_bytes: int) -> tuple[int, int]:
        """Return how long key and value of an item are as they are stored, of which quotas are charged."""


class Writer(Reader, Protocol):
    """A snapshot that sees its own writes; they become visible to others all together or not at all."""

    def put(self, table: str, key: bytes, value: bytes | bytearray | memoryview) -> None:
        """Store ``value`` under ``key``, in place of what stood there."""

    def delete(self, table: str, key: bytes) -> bool:
        """Remove ``key``; return whether it was there."""


class Index(Protocol):
    """An open store. Thread safe: any number of readers beside one writer.

    Keys have 1 to :data:`MAX_KEY_BYTES` bytes. Every method but ``close`` raises
    :class:`~promptdb.errors.StoreError` once it is closed.
    """

    readonly: bool

    def read(self) -> AbstractContextManager[Reader]:
        """Return a context manager that holds a snapshot. Never waits for writers."""

    def transact(self, work: Callable[[Writer], Result], *, frees: bool = False) -> Result:
        """Run ``work`` in a write transaction and commit it durably; undo everything if it raises.

        ``work`` may run more than once (the map may have to grow), so it must have no effects but its writes. A thread
        that is inside ``read()`` or ``transact()`` is refused: it would wait for itself. ``frees`` tells that ``work``
        removes more than it adds: space that was kept for a full disk may be used.
        """

    def stats(self) -> dict[str, int]:
        """Return sizes of the storage engine, in bytes, pages and counts."""

    def readings(self) -> tuple[int, list[Reading]]:
        """Return the number of the last transaction, and who may hold snapshots, in all processes."""

    def copy(self, path: Path, *, compact: bool = False) -> None:
        """Write one consistent state of all tables to a new file, private to the user, and sync it.

        Others write meanwhile; the map of this process cannot grow until it is done. With ``compact``, pages that are
        not in use are left out. Raises :class:`~promptdb.errors.StoreError` if there are no files to copy.
        """

    def compact(self, check: Callable[[Reader], None]) -> None:
        """Give space that is not in use back to the system. Waits for the readers of this process.

        ``check`` looks at what will take the tables' place, and raises what is wrong with it: everything is then as
        before. Raises :class:`~promptdb.errors.StoreError` if another process has the store open.
        """

    def close(self) -> None:
        """Release the store, when its readers have left. Closing twice is harmless; inside ``read()`` it is refused."""
