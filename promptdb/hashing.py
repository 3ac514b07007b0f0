"""Tagged, length-prefixed hashing: what every identity and key of the store is made with."""

from __future__ import annotations

import struct

from blake3 import blake3

from promptdb.errors import InputTypeError

__all__ = ["FieldHasher"]


class FieldHasher:
    """BLAKE3 over tagged, length-prefixed fields, so that no two sequences of fields share their bytes.

    A field is ``len(tag) | tag | type | len(value) | value``; lengths are unsigned 64-bit little-endian, ``type`` is
    one byte: ``b`` bytes, ``s`` UTF-8 text, ``i`` signed 64-bit little-endian, ``f`` IEEE 754 binary64 little-endian,
    ``t`` boolean, ``n`` None. The first field has tag ``domain`` and holds the domain.

    Parameters
    ----------
    domain : what is hashed and in which version of its layout; digests of different domains never meet.

    Notes
    -----
    Pure; about 1 µs a field. Not thread safe: one hasher, one thread.
    """

    __slots__ = ("_hash",)

    def __init__(self, domain: str) -> None:
        self._hash = blake3()
        self.field("domain", domain)

    def field(self, tag: str, value: bytes | str | int | float | bool | None) -> FieldHasher:
        """Add one field and return the hasher.

        Raises
        ------
        InputTypeError
            ``value`` has none of the types above.
        OverflowError
            ``value`` is an integer outside [-2**63, 2**63).
        """
        if isinstance(value, bytes):
            kind, raw = b"b", value
        elif isinstance(value, str):
            kind, raw = b"s", value.encode()
        elif isinstance(value, bool):  # before int, of which it is a subclass
            kind, raw = b"t", b"\x01" if value else b"\x00"
        elif isinstance(value, int):
            kind, raw = b"i", value.to_bytes(8, "little", signed=True)
        elif isinstance(value, float):
            kind, raw = b"f", struct.pack("<d", value)
        elif value is None:
            kind, raw = b"n", b""
        else:
            raise InputTypeError(f"field {tag!r}: cannot hash a {type(value).__name__}", "bytes, str, int, float, bool")
        name = tag.encode()
        self._hash.update(struct.pack("<Q", len(name)) + name + kind + struct.pack("<Q", len(raw)) + raw)
        return self

    def digest(self) -> bytes:
        """Return the 32-byte digest of the fields so far; more may follow."""
        return bytes(self._hash.digest())
