"""Encryption of what a store holds: values sealed so that none can be read, changed or moved, keys of tables hidden.

- Values: XAES-256-GCM (C2SP), AES-256-GCM under a key that is derived for each message from half of a random 192-bit
  nonce. AES-GCM alone must not see 2^32 messages with random nonces under one key, which a store of a million spans
  that are often touched comes near; here 2^80 are safe. AES-GCM-SIV would be safe too, at an eighth of the speed.
- Keys of tables: AES-256-SIV (RFC 5297), deterministic, so that equal keys are found again, and authenticated.

The only importer of cryptography.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from blake3 import blake3

from promptdb.buffers import POOL
from promptdb.errors import MissingLibraryError

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM, AESSIV
except ImportError as error:
    raise MissingLibraryError(
        "encrypted stores need the library cryptography, which is not installed", "pip install 'promptdb[encryption]'"
    ) from error

Bytes = bytes | bytearray | memoryview

NONCE_BYTES = 24
TAG_BYTES = 16
SEAL_BYTES = NONCE_BYTES + TAG_BYTES
"""How much longer a sealed value is."""
HIDDEN_BYTES = 16
"""How much longer a hidden name is."""

DATA_KEY_BYTES = 32
_WRAPPING = b"promptdb data key"
_VALUES, _NAMES = "promptdb 2026-11 values", "promptdb 2026-11 keys of tables"

# Larger values are sealed and opened in memory that was in use before.
_POOLED_BYTES = 1 << 16
_DERIVED_FROM = NONCE_BYTES // 2
# Content of a blob begins 48 bytes past a multiple of 64 (see blobs.py): so its numbers are aligned.
_PHASE_BYTES = 16


class Xaes256Gcm:
    """XAES-256-GCM as C2SP specifies it. Thread safe.

    Parameters
    ----------
    key : 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._block = Cipher(algorithms.AES256(key), modes.ECB()).encryptor()
        self._lock = threading.Lock()  # a block cipher of the library belongs to one thread at a time
        start = int.from_bytes(self._block.update(bytes(16)), "big")
        doubled = (start << 1) & ((1 << 128) - 1) ^ (0x87 if start >> 127 else 0)
        # Of both blocks that a message's key is made from: the counter, "X", and the mask.
        self._masks = [int.from_bytes(bytes((0, count, 0x58, 0)) + bytes(12), "big") ^ doubled for count in (1, 2)]

    def _message_key(self, nonce: bytes) -> AESGCM:
        half = int.from_bytes(nonce[:_DERIVED_FROM], "big")
        blocks = b"".join((mask ^ half).to_bytes(16, "big") for mask in self._masks)
        with self._lock:
            return AESGCM(self._block.update(blocks))

    def encrypt(self, nonce: bytes, value: Bytes, context: bytes) -> bytes:
        """Return ciphertext and tag. ``context`` is authenticated, not stored."""
        return self._message_key(nonce).encrypt(nonce[_DERIVED_FROM:], value, context)

    def seal(self, value: Bytes, context: bytes) -> Bytes:
        """Return a fresh nonce, ciphertext and tag."""
        nonce = os.urandom(NONCE_BYTES)
        if len(value) < _POOLED_BYTES:
            return nonce + self.encrypt(nonce, value, context)
        sealed = memoryview(POOL.lease(len(value) + SEAL_BYTES)).cast("B")
        sealed[:NONCE_BYTES] = nonce
        self._message_key(nonce).encrypt_into(nonce[_DERIVED_FROM:], value, context, sealed[NONCE_BYTES:])
        return sealed

    def open(self, sealed: Bytes, context: bytes) -> memoryview | None:
        """Return the value, or None if it was not sealed with this key in this context, or was changed since."""
        view = memoryview(sealed)
        size_bytes = len(view) - SEAL_BYTES
        if size_bytes < 0:
            return None
        nonce = bytes(view[:NONCE_BYTES])
        key, rest = self._message_key(nonce), nonce[_DERIVED_FROM:]
        try:
            if size_bytes < _POOLED_BYTES:
                return memoryview(key.decrypt(rest, view[NONCE_BYTES:], context))
            value = memoryview(POOL.lease(_PHASE_BYTES + size_bytes)).cast("B")[_PHASE_BYTES:]
            key.decrypt_into(rest, view[NONCE_BYTES:], context, value)
        except InvalidTag:
            return None
        return value


class Sealer:
    """Seals values and hides names with the data key of one store. Thread safe.

    Notes
    -----
    About 10 microseconds a value and 1 GB/s, 7 microseconds a name.
    """

    def __init__(self, data_key: bytes) -> None:
        self._data_key = data_key
        self._values = Xaes256Gcm(blake3(data_key, derive_key_context=_VALUES).digest())
        self._names = AESSIV(blake3(data_key, derive_key_context=_NAMES).digest(length=64))

    def seal(self, context: bytes, value: Bytes) -> Bytes:
        """Return a value as it is stored, ``SEAL_BYTES`` longer; only :meth:`open` with the same context reads it."""
        return self._values.seal(value, context)

    def open(self, context: bytes, sealed: Bytes) -> memoryview | None:
        """Return the value, or None if it was not sealed in this context, or was changed since."""
        return self._values.open(sealed, context)

    def hide(self, context: bytes, name: bytes) -> bytes:
        """Return a name, not empty, as it is stored, ``HIDDEN_BYTES`` longer: always the same for the same context."""
        return self._names.encrypt(name, [context])

    def reveal(self, context: bytes, hidden: bytes) -> bytes | None:
        """Return the name, or None if it was not hidden in this context."""
        if len(hidden) <= HIDDEN_BYTES:
            return None
        try:
            return self._names.decrypt(hidden, [context])
        except InvalidTag:
            return None

    def wrap(self, user_key: bytes) -> bytes:
        """Return the data key, sealed with a user's key."""
        return bytes(Xaes256Gcm(user_key).seal(self._data_key, _WRAPPING))

    @classmethod
    def unwrap(cls, wrapped: bytes, user_key: bytes) -> Sealer | None:
        """Return the sealer whose data key was sealed with a user's key, or None if that was another key."""
        data_key = Xaes256Gcm(user_key).open(wrapped, _WRAPPING)
        return None if data_key is None else cls(bytes(data_key))

    @classmethod
    def new(cls) -> Sealer:
        """Return a sealer with a random data key."""
        return cls(os.urandom(DATA_KEY_BYTES))

    def __repr__(self) -> str:
        return "Sealer()"

    def __reduce__(self) -> Any:
        raise TypeError("keys are not written anywhere")
