"""A file that only takes space: when the disk is full it is given up, so that something can be removed.

LMDB writes pages even to remove something. On a full disk it could not, and nothing would ever become free.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

RESERVE_FILE = "reserve"
_SHARE = 8
_MAX_BYTES = 1 << 20
_MIN_BYTES = 1 << 16


class Reserve:
    """The reserve of a store: an eighth of what it uses, at most 1 MiB, once that is 64 KiB. May be deleted any time.

    Parameters
    ----------
    directory : of the store.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / RESERVE_FILE
        self._size_bytes = 0  # that this process knows of

    def keep(self, used_bytes: int) -> None:
        """Make the reserve of a store that uses ``used_bytes`` large enough, if there is room. Free if it is."""
        wanted = min(used_bytes // _SHARE, _MAX_BYTES)
        if wanted < _MIN_BYTES or wanted < 2 * self._size_bytes or self._size_bytes == _MAX_BYTES:
            return
        with suppress(OSError):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                self._size_bytes = os.fstat(descriptor).st_size
                if self._size_bytes < wanted:
                    os.posix_fallocate(descriptor, 0, wanted)
                    self._size_bytes = wanted
            except OSError:
                if self._size_bytes < _MIN_BYTES:
                    self._path.unlink()  # what it got is too little, and somebody else may need it
                raise
            finally:
                os.close(descriptor)

    def release(self) -> bool:
        """Give the space back to the disk; return whether there was any."""
        self._size_bytes = 0
        try:
            size_bytes = self._path.stat().st_size
            self._path.unlink()
        except OSError:
            return False
        return size_bytes > 0
