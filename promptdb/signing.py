"""Who computed a value: Ed25519 signatures of what goes to the shared store. The only importer of cryptography.

Keys and values that came from a model cannot be told from others without computing them again. So whoever can write to
the shared store can poison it; a signature says who did, and readers choose whom they trust.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from promptdb.errors import SharedError

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
_DOMAIN = b"promptdb shared entry 1\0"


class Signer:
    """Signs with a private key.

    Parameters
    ----------
    path : PEM file (PKCS #8) with an Ed25519 key, as :func:`write_key` makes it.

    Raises
    ------
    SharedError
        It cannot be read, holds another kind of key, or others may read it.
    """

    def __init__(self, path: str) -> None:
        crypto = _crypto()
        try:
            if os.name == "posix" and Path(path).stat().st_mode & 0o077:
                raise SharedError(f"{path} can be read by others", f"chmod 600 {path}")
            key = crypto.serialization.load_pem_private_key(Path(path).read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, SharedError):
                raise
            raise SharedError(f"the key {path} cannot be read: {error}", "`promptdb shared keygen FILE`") from error
        if not isinstance(key, crypto.ed25519.Ed25519PrivateKey):
            raise SharedError(f"{path} holds no Ed25519 key", "`promptdb shared keygen FILE` makes one")
        self._key = key
        self.public_key: bytes = key.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Return a signature, 64 bytes. Some 50 microseconds."""
        signature: bytes = self._key.sign(_DOMAIN + message)
        return signature


class Trust:
    """The public keys of those who are trusted.

    Parameters
    ----------
    path : text file with one key a line, in hex; what follows a ``#`` is a comment.

    Raises
    ------
    SharedError
        It cannot be read, holds something else, or no key at all.
    """

    def __init__(self, path: str) -> None:
        crypto = _crypto()
        self._invalid = crypto.InvalidSignature
        self._keys: dict[bytes, Any] = {}
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise SharedError(f"the trusted keys in {path} cannot be read: {error}", "check the path") from error
        for number, line in enumerate(lines, 1):
            text = line.partition("#")[0].strip()
            if not text:
                continue
            try:
                raw = bytes.fromhex(text)
                self._keys[raw] = crypto.ed25519.Ed25519PublicKey.from_public_bytes(raw)
            except ValueError:
                raise SharedError(
                    f"{path}, line {number}: no public key", "64 hexadecimal digits, as `promptdb shared keygen` prints"
                ) from None
        if not self._keys:
            raise SharedError(f"{path} names nobody to trust", "add a public key, or leave the setting out")

    def holds(self, message: bytes, public_key: bytes, signature: bytes) -> bool:
        """Return whether somebody trusted signed a message. Some 100 microseconds."""
        key = self._keys.get(public_key)
        if key is None:
            return False
        try:
            key.verify(signature, _DOMAIN + message)
        except self._invalid:
            return False
        return True


def write_key(path: str) -> str:
    """Write a new private key to a file that only its owner may read; return its public key in hex.

    Raises
    ------
    SharedError
        The file is there, or cannot be written.
    """
    crypto = _crypto()
    key = crypto.ed25519.Ed25519PrivateKey.generate()
    serialization = crypto.serialization
    data = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError as error:
        raise SharedError(f"{path} cannot be written: {error.strerror}", "name a new file") from error
    public: str = key.public_key().public_bytes_raw().hex()
    return public


class _crypto:  # noqa: N801 - stands for a module
    """What is used of the library."""

    def __init__(self) -> None:
        try:
            from cryptography.exceptions import InvalidSignature
            from cryptography.hazmat.primitives import serialization
            from cryptography.hazmat.primitives.asymmetric import ed25519
        except ImportError as error:
            raise SharedError("signing needs the cryptography library", "pip install 'promptdb[signing]'") from error
        self.InvalidSignature, self.serialization, self.ed25519 = InvalidSignature, serialization, ed25519
