"""What goes wrong in LMDB, said in the terms of a store."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path

import lmdb

from promptdb.errors import (
    CorruptDataError,
    NotAStoreError,
    PromptDBError,
    ReadOnlyStoreError,
    StoreError,
    StoreFullError,
)

DATA_FILE = "data.mdb"
LOCK_FILE = "lock.mdb"

_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHORT_WRITE_BYTES = 1 << 16
_DENIED_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS)


def _is_short_write(text: str, path: Path) -> bool:
    """Return whether an input/output error is what LMDB makes of a write that found room for its first part only: on
    the disk, or below this process's limit on the size of files (``ulimit -f``)."""
    if os.strerror(errno.EIO) not in text:
        return False
    try:
        size = (path / DATA_FILE).stat().st_size
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        has_limit = limit != resource.RLIM_INFINITY
        return shutil.disk_usage(path).free < _SHORT_WRITE_BYTES or (has_limit and size + _SHORT_WRITE_BYTES > limit)
    except OSError:
        return False


def translated(error: Exception, path: Path) -> PromptDBError:
    """Return what to raise for an error of LMDB or of the system that has to do with the store at a path."""
    text = str(error)
    code = error.errno if isinstance(error, OSError) else None
    if code in _FULL_ERRNOS or any(os.strerror(full) in text for full in _FULL_ERRNOS) or _is_short_write(text, path):
        return StoreFullError(
            f"no space left for {path}: {text}", "free space or move the store; what it holds is still readable"
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
