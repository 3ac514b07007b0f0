"""Who has a store open: every process holds a lock on its directory, shared, but for one that replaces its file."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from promptdb.errors import StoreError

_WAIT_S = 30.0
_POLL_S = 0.02
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Presence:
    """A lock (flock) on a store's directory, shared until it is closed.

    Raises
    ------
    StoreError
        Somebody else has held it alone for half a minute.
    OSError
        The directory cannot be opened.

    Notes
    -----
    The kernel lets go of it when the process ends, however it ends. A forked child closes its copy.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._is_certain = True
        try:
            self.share()
        except BaseException:
            self.close()
            raise

    def share(self) -> None:
        """Hold the lock together with others; waits for one who holds it alone."""
        deadline = time.monotonic() + _WAIT_S
        while not self._lock(fcntl.LOCK_SH):
            if time.monotonic() > deadline:
                raise StoreError(
                    f"{self._directory} is being compacted by another process", "try again when it is done"
                )
            time.sleep(_POLL_S)

    def take(self) -> bool:
        """Hold the lock alone, and return True; or return False, as others have the store open, or nobody can tell."""
        if self._is_certain and self._lock(fcntl.LOCK_EX) and self._is_certain:
            return True
        self.share()  # a lock that could not be had may have cost the one that was held
        return False

    def _lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                self._is_certain = False
                return True
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        return True

    def close(self) -> None:
        """Let go."""
        os.close(self._descriptor)


def is_locked(lock_file: Path) -> bool:
    """Return whether LMDB has the environment of a lock file open in another process, by whatever program.

    To be called while this process does not have it open: closing any descriptor of the file would drop its locks.
    """
    try:
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # LMDB holds a read lock on the first byte for as long as an environment is open.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
