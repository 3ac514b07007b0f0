"""The store on disk: LMDB. The only importer of lmdb.

What LMDB asks of its user, and where it is done here:

- one process must not open the same environment twice: handles are shared, :func:`_shared_environment`;
- the map must not be resized or closed under an open transaction of the same process: :class:`_MapLock`;
- a map that another process has grown must be adopted before reading on: :meth:`LmdbIndex._adopt_map`;
- a forked child must not use its parent's environment: :meth:`LmdbIndex._check_usable` refuses;
- a file that was cut off kills whoever touches a page that is missing: :meth:`_Environment._cover_used_pages`;
- no network filesystem: :func:`promptdb.filesystem.refuse_remote`.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import lmdb

from promptdb.errors import (
    CorruptDataError,
    NotAStoreError,
    PromptDBError,
    ReadOnlyStoreError,
    StoreError,
    StoreFullError,
)
from promptdb.filesystem import refuse_remote
from promptdb.format import META, STORE_KEY, TABLES
from promptdb.presence import Presence, is_locked, sync_directory
from promptdb.reserve import Reserve
from promptdb.tables import Item, Reader, Result, Writer

DEFAULT_MAP_BYTES = 1 << 30
DATA_FILE = "data.mdb"
COMPACT_FILE = "data.mdb.compact"
LOCK_FILE = "lock.mdb"
_MAX_READERS = 512
_MAX_GROWTH_BYTES = 64 << 30

# Room for the tables and a first record; LMDB would refuse to create them in less.
_MIN_MAP_PAGES = 64

_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORT_WRITE_BYTES = 1 << 16
_DENIED_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS)


class _MapLock:
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
        thread = self.acquire()
        try:
            yield
        finally:
            self.release(thread)

    @contextmanager
    def alone(self) -> Iterator[None]:
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


class _Environment:
    """One lmdb environment of this process, with the handles that share it."""

    def __init__(self, path: Path, *, readonly: bool, map_bytes: int) -> None:
        self.path = path
        self.readonly = readonly
        self.pid = os.getpid()
        self.num_handles = 0
        self.map_lock = _MapLock()
        # LMDB has one writer at a time; its own mutex is not fair, and waiting here costs no file lock.
        self.write_lock = threading.Lock()
        self.tables: dict[str, Any] = {}
        self.reserve = Reserve(path)
        try:
            self.presence = Presence(path)
        except OSError as error:
            raise error if isinstance(error, PromptDBError) else _translated(error, path) from error
        try:
            self._begin(max(map_bytes, _MIN_MAP_PAGES * mmap.PAGESIZE))
        except BaseException:
            self.presence.close()
            raise

    def _begin(self, map_bytes: int) -> None:
        """Open the file, and all tables."""
        path = self.path
        try:
            if not self.readonly:
                (path / COMPACT_FILE).unlink(missing_ok=True)  # of somebody who was killed: none compacts it now
            self.env = self._open(map_bytes)
        except (lmdb.Error, OSError) as error:
            raise _translated(error, path) from error
        try:
            self._cover_used_pages()
            self._open_tables()
            self.data_file = _identity(path / DATA_FILE)
        except BaseException as error:
            self.env.close()
            if isinstance(error, (lmdb.Error, OSError)) and not isinstance(error, PromptDBError):
                raise _translated(error, path) from error
            raise

    def end(self) -> None:
        """Close the file."""
        self.env.close()
        self.presence.close()

    def replace(self, check: Callable[[Reader], None]) -> None:
        """Put a compacted and checked copy in the place of the file. Nothing of this process may be using it."""
        if not self.presence.take():
            raise self._others_are_here()
        part, map_bytes = self.path / COMPACT_FILE, self.env.info()["map_size"]
        try:
            write_copy(self.env, part, compact=True)
            _check_copy(part, check)
            self.env.close()
            try:
                if is_locked(self.path / LOCK_FILE):
                    raise self._others_are_here()
                part.replace(self.path / DATA_FILE)
                sync_directory(self.path)
            finally:
                self._begin(map_bytes)
        except (lmdb.Error, OSError) as error:
            raise error if isinstance(error, PromptDBError) else _translated(error, self.path) from error
        finally:
            part.unlink(missing_ok=True)
            self.presence.share()

    def _others_are_here(self) -> StoreError:
        return StoreError(
            f"{self.path} is open in other processes", "close it there: nobody else may use it while it is compacted"
        )

    def _open(self, map_bytes: int) -> Any:
        options: dict[str, Any] = {
            "max_dbs": len(TABLES) + 8,
            "max_readers": _MAX_READERS,
            "max_spare_txns": 8,
            "map_size": map_bytes,
            "subdir": True,
            # Blobs are read once, front to back, and the map is far larger than what a read needs.
            "readahead": True,
            # Unused parts of a page are zeroed, so that nothing else of this process's memory reaches the disk.
            "meminit": True,
            "mode": 0o600,
        }
        if not self.readonly:
            env = lmdb.open(str(self.path), create=True, **options)
            env.reader_check()  # readers that were killed hold pages back
            return env
        try:
            return lmdb.open(str(self.path), readonly=True, create=False, **options)
        except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError):
            raise
        except lmdb.Error:
            # The directory cannot hold a lock file. Without one a writer elsewhere could reuse pages under a reader;
            # checksums then turn what was read into a miss.
            return lmdb.open(str(self.path), readonly=True, create=False, lock=False, **options)

    def _cover_used_pages(self) -> None:
        """Make sure that every used page is in the file: to touch one that is not would kill the process (SIGBUS).

        A file may end before the last page that it counts, where that page was allocated and freed in one transaction.
        A file that a bad copy cut off looks the same: its new pages read as zeros, which LMDB or a checksum refuses.
        """
        data_file = self.path / DATA_FILE
        used_bytes = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
        missing_bytes = used_bytes - data_file.stat().st_size
        if missing_bytes <= 0:
            return
        try:
            with data_file.open("r+b") as file:
                # Never shrinks the file, whatever another process has appended meanwhile.
                os.posix_fallocate(file.fileno(), used_bytes - missing_bytes, missing_bytes)
        except OSError as error:
            raise CorruptDataError(
                f"{data_file} is {missing_bytes} bytes shorter than its own page count", "restore it from a copy"
            ) from error

    def _open_tables(self) -> None:
        if self.readonly:
            for name in TABLES:
                try:
                    self.tables[name] = self.env.open_db(name.encode(), create=False)
                except (lmdb.NotFoundError, lmdb.ReadonlyError):
                    continue
            return
        with self.env.begin() as transaction:
            names = {bytes(key) for key, _ in transaction.cursor()}
        if names - {name.encode() for name in TABLES} and not self._has_settings(names):
            raise NotAStoreError(f"{self.path / DATA_FILE} is an LMDB file of something else", "choose another path")
        self.tables = {name: self.env.open_db(name.encode()) for name in TABLES}

    def _has_settings(self, names: set[bytes]) -> bool:
        if META.encode() not in names:
            return False
        table = self.env.open_db(META.encode(), create=False)
        with self.env.begin() as transaction:
            return transaction.get(STORE_KEY, db=table) is not None


def check_pages(path: Path) -> list[str]:
    """Read the pages of a store without LMDB, which trusts its files, and return what does not hold.

    A file that passes cannot make LMDB fail, as long as nobody changes it. Records and blobs are not looked at.

    Parameters
    ----------
    path : directory of the store. Nobody may write to it meanwhile: pages in the middle of a change look damaged.

    Raises
    ------
    NotAStoreError
        There is no data file, or a link, pipe or device in its place.
    StoreError
        The file cannot be read, or the installed lmdb has no verifier.

    Notes
    -----
    Python reads every page of the trees: some thousands a second; pages of large blobs cost almost nothing. Memory: two
    bytes a page.
    """
    try:
        from lmdb.verify import VerifyError, verify
    except ImportError as error:
        raise StoreError("this version of lmdb cannot check a file before it is opened", "install lmdb 3") from error
    check: Callable[..., list[str]] = verify
    data_file = path / DATA_FILE
    try:
        if not stat.S_ISREG(data_file.lstat().st_mode):
            raise NotAStoreError(f"{data_file} is a link, pipe or device", "copy the file itself into a new directory")
        return [str(problem) for problem in check(str(data_file), subdir=False)]
    except VerifyError as error:
        return [str(error)]
    except FileNotFoundError as error:
        raise NotAStoreError(f"there is no store at {path}", "a store is a directory with a data.mdb") from error
    except PromptDBError:
        raise
    except OSError as error:
        raise _translated(error, path) from error
    except Exception as error:  # noqa: BLE001 - a file made to confuse it: trees inside of trees, for example
        return [f"it cannot be read: {error!r}"]


_environments: dict[tuple[int, int], _Environment] = {}
_environments_lock = threading.Lock()
_inherited: list[_Environment] = []


def _leave_parent() -> None:
    """Forget, in a forked child, what the parent has open: it is never touched and never closed there.

    To close it would free the parent's slots in the table of readers, and with them the pages that the parent reads.
    """
    global _environments_lock
    _environments_lock = threading.Lock()  # the parent may have held it
    if _environments:
        for environment in _environments.values():
            environment.presence.close()  # the child's copy: the parent keeps its own
        _inherited.extend(_environments.values())
        _environments.clear()
        _let_child_open()


def _let_child_open() -> None:
    """Make py-lmdb forget what the parent has open: it refuses to open a file twice, and inherits its list of them."""
    try:
        from lmdb import _envid

        inherited_keys: Any = _envid.env_keys
    except (ImportError, AttributeError):
        return  # a version without that list
    child = os.getpid()
    _envid.env_keys = lambda path, subdir: tuple((child, key) for key in inherited_keys(path, subdir))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_parent)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _shared_environment(path: Path, *, readonly: bool, map_bytes: int) -> _Environment:
    try:
        identity = _identity(path)
    except OSError as error:
        raise _translated(error, path) from error
    with _environments_lock:
        environment = _environments.get(identity)
        if environment is not None and not _is_current(environment, path):
            environment = None  # the files were deleted, and others made in their place
        if environment is not None and environment.readonly and not readonly:
            raise StoreError(
                f"{path} is already open for reading only in this process", "close the read-only handle first"
            )
        if environment is None:
            environment = _Environment(path, readonly=readonly, map_bytes=map_bytes)
            _environments[identity] = environment
        environment.num_handles += 1
        return environment


def _is_current(environment: _Environment, path: Path) -> bool:
    try:
        return environment.data_file == _identity(path / DATA_FILE)
    except OSError:
        return False


def _is_short_write(text: str, path: Path) -> bool:
    """Return whether an input/output error is what LMDB makes of a write that found room for its first part only."""
    try:
        return os.strerror(errno.EIO) in text and shutil.disk_usage(path).free < _SHORT_WRITE_BYTES
    except OSError:
        return False


def _translated(error: Exception, path: Path) -> PromptDBError:
    text = str(error)
    code = error.errno if isinstance(error, OSError) else None
    if code in _FULL_ERRNOS or any(os.strerror(full) in text for full in _FULL_ERRNOS) or _is_short_write(text, path):
        return StoreFullError(
            f"no space left for {path}: {text}", "free space or move the store; what it held is still readable"
        )
    if isinstance(error, (lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.IncompatibleError)):
        return NotAStoreError(
            f"{path / DATA_FILE} is not a promptdb store: {text}",
            "choose another path, or restore the file from a copy",
        )
    if isinstance(error, (lmdb.CorruptedError, lmdb.PageNotFoundError)):
        return CorruptDataError(f"{path / DATA_FILE} is damaged: {text}", "restore it from a copy")
    if isinstance(error, lmdb.ReadonlyError) or any(os.strerror(denied) in text for denied in _DENIED_ERRNOS):
        return ReadOnlyStoreError(f"{path} cannot be written: {text}", "check the permissions, or open it read-only")
    if "already open in this process" in text:
        return StoreError(f"{path}: {text}", "start processes with spawn, or fork before the store is opened")
    return StoreError(f"{path}: {text}")


def write_copy(env: Any, path: Path, *, compact: bool) -> None:
    """Write a consistent copy of an environment to a new file, private to the user, and sync it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        env.copyfd(descriptor, compact=compact)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_copy(path: Path, check: Callable[[Reader], None]) -> None:
    """Open a copy for ``check``, which raises what is wrong with it."""
    copied = lmdb.open(str(path), subdir=False, readonly=True, lock=False, max_dbs=len(TABLES) + 8)
    try:
        tables = {name: copied.open_db(name.encode(), create=False) for name in TABLES}
        with copied.begin(buffers=True) as transaction:
            check(_LmdbTransaction(transaction, tables))
    finally:
        copied.close()


class LmdbIndex:
    """Tables in an LMDB environment. See :class:`promptdb.tables.Index` for the contract.

    Parameters
    ----------
    path : directory of the store; created, private to the user, unless ``readonly``.
    readonly : open without the right to write.
    map_bytes : initial size of the memory map. It doubles by itself (by 64 GiB at most) when it is full.

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

    def __init__(self, path: Path, *, readonly: bool = False, map_bytes: int = DEFAULT_MAP_BYTES) -> None:
        if not readonly:
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except (OSError, ValueError) as error:  # ValueError: a NUL in the path
                raise _translated(error, path) from error
        refuse_remote(path)
        self.readonly = readonly
        self._environment = _shared_environment(path, readonly=readonly, map_bytes=map_bytes)
        self._closed = False

    def _check_usable(self) -> _Environment:
        environment = self._environment
        if self._closed:
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
                raise _translated(error, environment.path) from error
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
                    translated = _translated(error, environment.path)
                    if not (frees and isinstance(translated, StoreFullError) and environment.reserve.release()):
                        raise translated from error

    def _commit(self, work: Callable[[Writer], Result]) -> Result:
        environment = self._environment
        environment.reserve.keep(environment.env.info()["last_pgno"] * mmap.PAGESIZE)
        transaction = environment.env.begin(write=True, buffers=True)
        writer = _LmdbTransaction(transaction, environment.tables)
        try:
            result = work(writer)
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
            except lmdb.MemoryError as error:  # no addresses left for a larger map
                raise StoreFullError(
                    f"{environment.path}: the map cannot grow beyond {size} bytes: {error}",
                    "raise the limit of address space (ulimit -v); what the store held is still readable",
                ) from error
            except lmdb.Error as error:
                raise _translated(error, environment.path) from error

    def _adopt_map(self) -> None:
        environment = self._environment
        with environment.map_lock.alone():
            self._check_usable()
            try:
                environment.env.set_mapsize(0)
            except lmdb.Error as error:
                raise _translated(error, environment.path) from error

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
                raise _translated(error, path) from error

    def compact(self, check: Callable[[Reader], None]) -> None:
        """Give unused space back to the disk; see :meth:`promptdb.tables.Index.compact`."""
        environment = self._check_usable()
        if self.readonly:
            raise ReadOnlyStoreError(f"{environment.path} is open for reading only", "open it for writing")
        with environment.write_lock, environment.map_lock.alone():
            self._check_usable()
            environment.replace(check)

    def close(self) -> None:
        """Release the environment; the last handle of the process closes it."""
        environment = self._environment
        if environment.pid != os.getpid():
            self._closed = True
            return
        with _environments_lock:
            if self._closed:
                return
            if environment.num_handles == 1:
                with environment.map_lock.alone():  # views on the map die with it: wait for those who read
                    self._closed = True
                    for identity, held in list(_environments.items()):
                        if held is environment:
                            del _environments[identity]
                    environment.end()
            self._closed = True
            environment.num_handles -= 1


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
            raise _translated(error, environment.path) from error


class _LmdbTransaction:
    """A :class:`promptdb.tables.Writer` over one lmdb transaction."""

    __slots__ = ("_tables", "_transaction")

    def __init__(self, transaction: Any, tables: dict[str, Any]) -> None:
        self._transaction = transaction
        self._tables = tables

    def get(self, table: str, key: bytes) -> memoryview | None:
        handle = self._tables.get(table)  # None: the store was opened for reading, and never had that table
        return None if handle is None else self._transaction.get(key, db=handle)

    def size(self, table: str, key: bytes) -> int | None:
        handle = self._tables.get(table)
        value = None if handle is None else self._transaction.get(key, db=handle)  # a view: nothing is read
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

    def delete(self, table: str, key: bytes) -> bool:
        deleted: bool = self._transaction.delete(key, db=self._tables[table])
        return deleted
