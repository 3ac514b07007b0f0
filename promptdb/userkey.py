"""The key that a user gives for an encrypted store: an argument, the environment or a file. Never shown, nor logged.

A key is 32 random bytes, written as 64 hexadecimal digits. No passphrases: what people can remember can be guessed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from promptdb.errors import InputTypeError, StoreKeyError
from promptdb.events import warn

KEY_VARIABLE = "PROMPTDB_KEY"
KEY_FILE_VARIABLE = "PROMPTDB_KEY_FILE"
KEY_BYTES = 32

_HOW = f"a key is {2 * KEY_BYTES} hexadecimal digits: `openssl rand -hex {KEY_BYTES}` makes one"
_MOST_BYTES = 4096


def find_key(
    key: str | bytes | None,
    variables: tuple[str, str] = (KEY_VARIABLE, KEY_FILE_VARIABLE),
    environment: Mapping[str, str] = os.environ,
) -> bytes | None:
    """Return the key that was given, or that of the environment, or None if there is none.

    Parameters
    ----------
    key : 64 hexadecimal digits or 32 bytes; empty: none; None: ``$PROMPTDB_KEY``, or what the file
        ``$PROMPTDB_KEY_FILE`` holds.
    variables : names of both variables.

    Raises
    ------
    StoreKeyError
        What was given is no key, the file cannot be read, or both variables are set.
    """
    if key is not None:
        return _parsed(key, "the key") if key else None
    text, file = (environment.get(name) for name in variables)
    if text and file:
        raise StoreKeyError(f"{' and '.join(variables)} are both set", "set one of them")
    if file:
        return read_key_file(file)
    return _parsed(text, variables[0]) if text else None


def read_key_file(path: str | os.PathLike[str]) -> bytes:
    """Return the key in a file: its digits, with white space around them. Raises :class:`StoreKeyError`."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MOST_BYTES)
            mode = os.fstat(file.fileno()).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreKeyError(
            f"the key file {path} cannot be read: {reason}", "check the path and its permissions"
        ) from None
    if mode & 0o077:
        warn("key_file_open", f"the key file {path} can be read by others: chmod 600 {path}")
    return _parsed(content.decode("ascii", "replace").strip(), f"the file {path}")


def _parsed(key: str | bytes, where: str) -> bytes:
    """Return the bytes of a key. What is wrong with it is told without showing any of it."""
    if isinstance(key, bytes):
        found: bytes | None = key
    elif isinstance(key, str):
        try:
            found = bytes.fromhex(key) if len(key) == 2 * KEY_BYTES else None
        except ValueError:
            found = None
    else:
        raise InputTypeError(f"a key must be a str or bytes, not {type(key).__name__}", _HOW)
    if found is None or len(found) != KEY_BYTES:
        raise StoreKeyError(f"{where} does not hold a key: it has {len(key)} characters or others than digits", _HOW)
    return found
