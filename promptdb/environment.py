"""LMDB environments: opened once in a process, shared by its handles, left alone by forked children.

What LMDB asks of its user, and where it is done:

- one process must not open the same environment twice: handles are shared, :func:`shared_environment`;
- the map must not be resized or closed under an open transaction of the same process:
  :class:`promptdb.maplock.MapLock`;
- a map that another process has grown must be adopted before reading on: :meth:`promptdb.index.LmdbIndex._adopt_map`;
- a forked child must not use its parent's environment: :meth:`promptdb.index.LmdbIndex._check_usable` refuses;
- a file that was cut off kills whoever touches a page that is missing: :meth:`Environment._cover_used_pages`;
- no network filesystem: :func:`promptdb.filesystem.refuse_remote`.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import lmdb

from promptdb.allocator import keep_freed_memory
from promptdb.errors import CorruptDataError, NotAStoreError, PromptDBError, StoreError
from promptdb.filesystem import sync_directory
from promptdb.format import META, STORE_KEY, TABLES
from promptdb.lmdb_errors import DATA_FILE, LOCK_FILE, translated
from promptdb.maplock import MapLock
from promptdb.presence import Presence, is_locked
from promptdb.reserve import Reserve

COMPACT_FILE = "data.mdb.compact"
_MAX_READERS = 512

# Room for the tables and a first record; LMDB would refuse to create them in less.
_MIN_MAP_PAGES = 64


DURABILITIES = {
    "power": {"sync": True, "metasync": True},
    "recent": {"sync": True, "metasync": False},
    "process": {"sync": False, "metasync": False},
}
"""What a commit survives, by name, and how LMDB is told. ``power``: the machine losing power. ``recent``: the same, but
for the last commits, which may be undone; what is left is whole. ``process``: the process being killed; if the machine
fails, the store may be lost."""


class Handle(Protocol):
    """Who shares an environment."""

    is_closed: bool


class Environment:
    """One lmdb environment of this process, with the handles that share it."""

    def __init__(self, path: Path, *, readonly: bool, map_bytes: int, durability: str) -> None:
        self.path = path
        self.readonly = readonly
        self.durability = durability
        self.is_synced = bool(DURABILITIES[durability]["sync"])
        self.pid = os.getpid()
        self.num_handles = 0
        self.map_lock = MapLock()
        # LMDB has one writer at a time; its own mutex is not fair, and waiting here costs no file lock.
        self.write_lock = threading.Lock()
        self.tables: dict[str, Any] = {}
        self.reserve = Reserve(path)
        try:
            self.presence = Presence(path)
        except OSError as error:
            raise error if isinstance(error, PromptDBError) else translated(error, path) from error
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
            raise translated(error, path) from error
        try:
            self._cover_used_pages()
            self._open_tables()
            self.data_file = _identity(path / DATA_FILE)
        except BaseException as error:
            self.env.close()
            if isinstance(error, (lmdb.Error, OSError)) and not isinstance(error, PromptDBError):
                raise translated(error, path) from error
            raise

    def begin_again(self, map_bytes: int) -> None:
        """Open the file anew, with a map of this size. Nothing of this process may be using it."""
        self.env.close()
        self._begin(map_bytes)

    def end(self) -> None:
        """Close the file."""
        self.env.close()
        self.presence.close()

    def replace(self, check: Callable[[Path], None], kept: Path | None = None) -> None:
        """Put a compacted copy, which ``check`` may change and has accepted, in the place of the file.

        Nothing of this process may be using it. The file that was there is ``kept`` under that name, or deleted.
        """
        if not self.presence.take():
            raise self._others_are_here()
        part, map_bytes = self.path / COMPACT_FILE, self.env.info()["map_size"]
        try:
            write_copy(self.env, part, compact=True)
            check(part)
            self.env.close()
            try:
                if is_locked(self.path / LOCK_FILE):
                    raise self._others_are_here()
                if kept is not None:
                    kept.hardlink_to(self.path / DATA_FILE)
                part.replace(self.path / DATA_FILE)
                sync_directory(self.path)
            finally:
                self._begin(map_bytes)
        except (lmdb.Error, OSError) as error:
            raise error if isinstance(error, PromptDBError) else translated(error, self.path) from error
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
            keep_freed_memory()
            env = lmdb.open(str(self.path), create=True, **options, **DURABILITIES[self.durability])
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


_environments: dict[tuple[int, int], Environment] = {}
_environments_lock = threading.Lock()
_inherited: list[Environment] = []


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


def shared_environment(path: Path, *, readonly: bool, map_bytes: int, durability: str) -> Environment:
    """Return this process's environment for a directory, opened if it is not, with one handle more.

    Raises
    ------
    StoreError
        It is open in another way.
    """
    try:
        identity = _identity(path)
    except OSError as error:
        raise translated(error, path) from error
    with _environments_lock:
        environment = _environments.get(identity)
        if environment is not None and not _is_current(environment, path):
            environment = None  # the files were deleted, and others made in their place
        if environment is not None and environment.readonly and not readonly:
            raise StoreError(
                f"{path} is already open for reading only in this process", "close the read-only handle first"
            )
        if environment is not None and not readonly and environment.durability != durability:
            raise StoreError(
                f"{path} is open in this process with durability {environment.durability!r}, not {durability!r}",
                "open it the same way everywhere",
            )
        if environment is None:
            environment = Environment(path, readonly=readonly, map_bytes=map_bytes, durability=durability)
            _environments[identity] = environment
        environment.num_handles += 1
        return environment


def release(environment: Environment, handle: Handle) -> None:
    """Close a handle; the last one closes the environment, once nobody reads. Closing twice is harmless."""
    if environment.pid != os.getpid():
        handle.is_closed = True
        return
    with _environments_lock:
        if handle.is_closed:
            return
        if environment.num_handles == 1:
            with environment.map_lock.alone():  # views on the map die with it: wait for those who read
                handle.is_closed = True
                for identity, held in list(_environments.items()):
                    if held is environment:
                        del _environments[identity]
                environment.end()
        handle.is_closed = True
        environment.num_handles -= 1


def _is_current(environment: Environment, path: Path) -> bool:
    try:
        return environment.data_file == _identity(path / DATA_FILE)
    except OSError:
        return False


def write_copy(env: Any, path: Path, *, compact: bool) -> None:
    """Write a consistent copy of an environment to a new file, private to the user, and sync it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        env.copyfd(descriptor, compact=compact)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
