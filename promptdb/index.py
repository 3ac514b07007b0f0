"""The store on disk: tables in LMDB, with transactions, growth of the map, copies. See :mod:`promptdb.environment`."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import lmdb

from promptdb.environment import Environment, release, shared_environment, write_copy
from promptdb.errors import PromptDBError, ReadOnlyStoreError, StoreError, StoreFullError
from promptdb.filesystem import refuse_remote
from promptdb.format import TABLES
from promptdb.lmdb_errors import DATA_FILE, translated
from promptdb.tables import Item, Reader, Reading, Result, Writer
from promptdb.writeback import early_writeback

DEFAULT_MAP_BYTES = 1 << 30
DEFAULT_DURABILITY = "power"
_MAX_GROWTH_BYTES = 64 << 30


class LmdbIndex:
    """Tables in an LMDB environment. See :class:`promptdb.tables.Index` for the contract.

    Parameters
    ----------
    path : directory of the store; created, private to the user, unless ``readonly``.
    readonly : open without the right to write.
    map_bytes : initial size of the memory map. It doubles by itself (by 64 GiB at most) when it is full.
    durability : what a commit survives; one of :data:`promptdb.environment.DURABILITIES`.

    Raises
    ------
    NotAStoreError
        The directory holds a file of the right name that LMDB does not understand.
    RemoteFilesystemError
        The directory is on a network filesystem.
    ReadOnlyStoreError, StoreFullError, StoreError
        The system's reason why it cannot be opened.

    Notes
    -----
    Thread safe. Handles of one process on one directory share one environment. A handle is refused in a forked child.
    """

    def __init__(
        self,
        path: Path,
        *,
        readonly: bool = False,
        map_bytes: int = DEFAULT_MAP_BYTES,
        durability: str = DEFAULT_DURABILITY,
    ) -> None:
        if not readonly:
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except (OSError, ValueError) as error:  # ValueError: a NUL in the path
                raise translated(error, path) from error
        refuse_remote(path)
        self.readonly = readonly
        self._environment = shared_environment(path, readonly=readonly, map_bytes=map_bytes, durability=durability)
        self.is_closed = False

    def _check_usable(self) -> Environment:
        environment = self._environment
        if self.is_closed:
            raise StoreError(f"{environment.path} is closed", "open the store again")
        if environment.pid != os.getpid():
            raise StoreError(f"{environment.path} was opened before this process was forked", "open it in the child")
        return environment

    def _begin_read(self) -> tuple[int, Any]:
        """Return the thread for which the map lock is now held shared, and a read transaction."""
        environment = self._environment
        while True:
            self._check_usable()
            thread = environment.map_lock.acquire()
            try:
                self._check_usable()  # it may have been closed while we waited
                return thread, environment.env.begin(buffers=True)
            except lmdb.MapResizedError:
                environment.map_lock.release(thread)
            except lmdb.Error as error:
                environment.map_lock.release(thread)
                raise translated(error, environment.path) from error
            except BaseException:
                environment.map_lock.release(thread)
                raise
            self._adopt_map()

    def read(self) -> AbstractContextManager[Reader]:
        """Hold a snapshot; see :meth:`promptdb.tables.Index.read`."""
        return _Reading(self)

    def transact(self, work: Callable[[Writer], Result], *, frees: bool = False) -> Result:
        """Run ``work`` and commit it; see :meth:`promptdb.tables.Index.transact`."""
        environment = self._check_usable()
        if self.readonly:
            raise ReadOnlyStoreError(f"{environment.path} is open for reading only", "open it for writing")
        if environment.map_lock.is_held():
            # The map could not grow under this thread's own snapshot, and two such threads would wait for each other.
            raise StoreError("a thread cannot write while it reads", "leave read() first")
        with environment.write_lock:
            while True:
                try:
                    with environment.map_lock.shared():
                        self._check_usable()
                        return self._commit(work)
                except lmdb.MapFullError:
                    self._grow_map()
                except lmdb.MapResizedError:
                    self._adopt_map()
                except lmdb.Error as error:
                    reason = translated(error, environment.path)
                    if not (frees and isinstance(reason, StoreFullError) and environment.reserve.release()):
                        raise reason from error

    def _commit(self, work: Callable[[Writer], Result]) -> Result:
        environment = self._environment
        environment.reserve.keep(environment.env.info()["last_pgno"] * mmap.PAGESIZE)
        transaction = environment.env.begin(write=True, buffers=True)
        writer = _LmdbTransaction(transaction, environment.tables)
        try:
            result = work(writer)
            written_bytes = writer.put_bytes if environment.is_synced else 0
            with early_writeback(environment.path / DATA_FILE, written_bytes):
                transaction.commit()
        except BaseException:
            transaction.abort()
            raise
        return result

    def _grow_map(self) -> None:
        environment = self._environment
        with environment.map_lock.alone():
            environment.env.reader_check()
            size = environment.env.info()["map_size"]
            try:
                environment.env.set_mapsize(size + min(size, _MAX_GROWTH_BYTES))
            except lmdb.MemoryError as error:  # no addresses left for a larger map, and the old one is gone
                environment.begin_again(size)
                raise StoreFullError(
                    f"{environment.path}: the map cannot grow beyond {size} bytes: {error}",
                    "raise the limit of address space (ulimit -v); what the store held is still readable",
                ) from error
            except lmdb.Error as error:
                raise translated(error, environment.path) from error

    def _adopt_map(self) -> None:
        environment = self._environment
        with environment.map_lock.alone():
            self._check_usable()
            try:
                environment.env.set_mapsize(0)
            except lmdb.Error as error:
                raise translated(error, environment.path) from error

    def stats(self) -> dict[str, int]:
        """Return sizes in bytes, and counts of pages and readers."""
        environment = self._check_usable()
        with environment.map_lock.shared():
            self._check_usable()
            info = environment.env.info()
            page_bytes = environment.env.stat()["psize"]
        return {
            "file_bytes": (environment.path / DATA_FILE).stat().st_size,
            "used_bytes": (info["last_pgno"] + 1) * page_bytes,
            "map_bytes": info["map_size"],
            "num_readers": info["num_readers"],
            "free_bytes": shutil.disk_usage(environment.path).free,
        }

    def readings(self) -> tuple[int, list[Reading]]:
        """Return who may hold snapshots; see :meth:`promptdb.tables.Index.readings`."""
        environment = self._check_usable()
        with environment.map_lock.shared():
            self._check_usable()
            lines = environment.env.readers().splitlines()[1:]  # pid, thread, transaction or "-"
            last: int = environment.env.info()["last_txnid"]
        fields = [line.split() for line in lines]
        return last, [Reading(int(pid), int(at) if at.isdigit() else -1) for pid, _, at in fields]

    def copy(self, path: Path, *, compact: bool = False) -> None:
        """Write a consistent copy of the data file; see :meth:`promptdb.tables.Index.copy`."""
        environment = self._check_usable()
        while True:
            try:
                with environment.map_lock.shared():
                    self._check_usable()
                    write_copy(environment.env, path, compact=compact)
                return
            except lmdb.MapResizedError:
                path.unlink()
                self._adopt_map()
            except (lmdb.Error, OSError) as error:
                if isinstance(error, PromptDBError):
                    raise
                raise translated(error, path) from error

    def compact(self, check: Callable[[Reader], None]) -> None:
        """Give unused space back to the disk; see :meth:`promptdb.tables.Index.compact`."""
        environment = self._check_usable()
        if self.readonly:
            raise ReadOnlyStoreError(f"{environment.path} is open for reading only", "open it for writing")
        with environment.write_lock, environment.map_lock.alone():
            self._check_usable()
            environment.replace(lambda part: _check_copy(part, check))

    def migrate(
        self, change: Callable[[Writer], None], check: Callable[[Reader], None], kept: Path | None = None
    ) -> None:
        """Change a copy of the tables, and put it in their place if ``check`` accepts it.

        However it ends, the file is the one before or the one after. Nobody else may have the store open.

        Parameters
        ----------
        change : writes to the copy, in one transaction.
        check : raises what is wrong with the copy then.
        kept : where the file that was there is kept; None: it is deleted.
        """
        environment = self._check_usable()

        def changed(part: Path) -> None:
            _change_copy(part, change)
            _check_copy(part, check)

        with environment.write_lock, environment.map_lock.alone():
            self._check_usable()
            environment.replace(changed, kept)

    def close(self) -> None:
        """Release the environment; the last handle of the process closes it."""
        release(self._environment, self)


class _Reading:
    """The context manager of a snapshot. A class: every lookup passes here, and a generator would double its cost."""

    __slots__ = ("_index", "_thread", "_transaction")

    def __init__(self, index: LmdbIndex) -> None:
        self._index = index

    def __enter__(self) -> Reader:
        self._thread, self._transaction = self._index._begin_read()
        return _LmdbTransaction(self._transaction, self._index._environment.tables)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        environment = self._index._environment
        self._transaction.abort()
        environment.map_lock.release(self._thread)
        if isinstance(error, lmdb.Error):
            raise translated(error, environment.path) from error


class _LmdbTransaction:
    """A :class:`promptdb.tables.Writer` over one lmdb transaction."""

    __slots__ = ("_tables", "_transaction", "put_bytes")

    def __init__(self, transaction: Any, tables: dict[str, Any]) -> None:
        self._transaction = transaction
        self._tables = tables
        self.put_bytes = 0  # of values

    def get(self, table: str, key: bytes) -> memoryview | None:
        handle = self._tables.get(table)  # None: the store was opened for reading, and never had that table
        # By position: lmdb takes a third longer with a keyword, and a lookup makes half a dozen of these calls.
        return None if handle is None else self._transaction.get(key, None, handle)

    def size(self, table: str, key: bytes) -> int | None:
        handle = self._tables.get(table)
        value = None if handle is None else self._transaction.get(key, None, handle)  # a view: nothing is read
        return None if value is None else len(value)

    def scan(self, table: str, start: bytes = b"", prefix: bytes = b"") -> Iterator[Item]:
        if table not in self._tables:
            return
        start = max(start, prefix)
        with self._transaction.cursor(self._tables[table]) as cursor:
            found = cursor.set_range(start) if start else cursor.first()
            while found:
                key = bytes(cursor.key())
                if not key.startswith(prefix):
                    return
                yield key, cursor.value()
                found = cursor.next()

    def keys(self, table: str, prefix: bytes = b"") -> Iterator[bytes]:
        return (key for key, _ in self.scan(table, prefix=prefix))

    def count(self, table: str) -> int:
        if table not in self._tables:
            return 0
        entries: int = self._transaction.stat(self._tables[table])["entries"]
        return entries

    def stored_sizes(self, table: str, key_bytes: int, value_bytes: int) -> tuple[int, int]:
        return key_bytes, value_bytes

    def put(self, table: str, key: bytes, value: bytes | bytearray | memoryview) -> None:
        self._transaction.put(key, value, db=self._tables[table])
        self.put_bytes += len(value)

    def delete(self, table: str, key: bytes) -> bool:
        deleted: bool = self._transaction.delete(key, db=self._tables[table])
        return deleted


def _change_copy(path: Path, change: Callable[[Writer], None]) -> None:
    """Run a transaction in a copy that nobody else knows of."""
    map_bytes = 2 * path.stat().st_size + DEFAULT_MAP_BYTES
    copied = lmdb.open(str(path), subdir=False, lock=False, max_dbs=len(TABLES) + 8, map_size=map_bytes)
    try:
        tables = {name: copied.open_db(name.encode()) for name in TABLES}
        with copied.begin(write=True, buffers=True) as transaction:
            change(_LmdbTransaction(transaction, tables))
    finally:
        copied.close()


def _check_copy(path: Path, check: Callable[[Reader], None]) -> None:
    """Open a copy for ``check``, which raises what is wrong with it."""
    copied = lmdb.open(str(path), subdir=False, readonly=True, lock=False, max_dbs=len(TABLES) + 8)
    try:
        tables = {name: copied.open_db(name.encode(), create=False) for name in TABLES}
        with copied.begin(buffers=True) as transaction:
            check(_LmdbTransaction(transaction, tables))
    finally:
        copied.close()
