"""Files that appear complete or not at all, and streams in their place."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from promptdb.errors import PromptDBError, StoreError
from promptdb.filesystem import sync_directory

File = str | os.PathLike[str] | BinaryIO

_BUFFER_BYTES = 1 << 20


@contextmanager
def source(file: File) -> Iterator[BinaryIO]:
    """Open a file for reading, or take a stream, which is not closed. Raises :class:`StoreError`."""
    if not isinstance(file, (str, os.PathLike)):
        yield file
        return
    path = _path(file)
    try:
        stream = path.open("rb", buffering=_BUFFER_BYTES)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}", "check the path and its permissions") from error
    with stream:
        yield stream


def _path(file: str | os.PathLike[str]) -> Path:
    if "\0" in os.fspath(file) or not os.fspath(file):
        raise StoreError(f"{file!r} is no path", "name a file")
    return Path(file)


@contextmanager
def destination(file: File, overwrite: bool) -> Iterator[BinaryIO]:
    """Open a file that appears when the block ends well, or take a stream, which is not closed.

    Raises
    ------
    StoreError
        The file is there and must not be overwritten, is being written by another process, or cannot be written.
    """
    if not isinstance(file, (str, os.PathLike)):
        yield file
        return
    path = _path(file)
    try:
        if path.is_dir():
            raise StoreError(f"{path} is a directory", "name a file in it")
        if path.exists() and not path.is_file():
            with path.open("wb", buffering=_BUFFER_BYTES) as stream:  # a pipe, or a device
                yield stream
            return
        if path.exists() and not overwrite:
            raise StoreError(f"{path} is there already", "choose another name, or replace it with --force")
        with _part(path) as stream:
            yield stream
    except (BrokenPipeError, PromptDBError):
        raise
    except OSError as error:
        hint = "check the path, its permissions and free space"
        raise StoreError(f"{path} cannot be written: {error.strerror}", hint) from error


@contextmanager
def _part(path: Path) -> Iterator[BinaryIO]:
    """Write ``path`` under another name, and rename it when it is complete."""
    part = path.with_name(path.name + ".part")
    with os.fdopen(_lock(part), "wb", buffering=_BUFFER_BYTES) as stream:
        # While it is open nobody else has the name.
        try:
            stream.truncate(0)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    sync_directory(path.parent)


def _lock(part: Path) -> int:
    """Open a file that nobody else writes; what an export that was killed left of it is used again."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        descriptor = os.open(part, flags, 0o600)
        try:
            if _is_ours(descriptor, part):
                os.fchmod(descriptor, 0o600)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_ours(descriptor: int, part: Path) -> bool:
    """Lock an open file; return whether it still has its name: its owner may have finished, or given up, meanwhile."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(f"another export is writing {part}", "wait for it, or choose another name") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise StoreError(f"{part} is no file", "remove it, or choose another name")
    try:
        named = part.lstat()
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (named.st_dev, named.st_ino)
