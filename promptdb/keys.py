"""Token bytes, prefix digests and index keys. Pure functions of bytes: no torch, no store.

A prompt is held as *packed tokens*: its IDs as little-endian uint32, one after the other. Everything that is hashed,
compared or stored is made from those bytes, never from a native integer type, so that machines agree.

============================  ==============================================================================
root digest ``R``             BLAKE3 of the tagged fields of a :class:`Root`
prefix digest ``d(i)``        BLAKE3 keyed with ``R`` over packed tokens ``[0, i)``
child hash of a span [s, e)   ``d(s)``: what the span is conditioned on
node ID of a span [s, e)      BLAKE3 keyed with ``d(s)`` over packed tokens ``[s, e)``
child key of a span [s, e)    ``d(s)``, then the span's first token, big-endian so that it sorts as a number
============================  ==============================================================================

The key of a keyed hash has a fixed width (32 bytes) and so has every token: no two inputs read the same.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from blake3 import blake3

from promptdb.errors import InputTypeError, TextEncodingError, TokenRangeError
from promptdb.hashing import FieldHasher

DIGEST_BYTES = 32
TOKEN_BYTES = 4

# Bump when the meaning of a stored representation changes: old nodes then miss instead of being misread.
ROOT_VERSION = 1

INT8 = "int8"
KV_CODECS = ("", INT8)
"""How keys and values may be stored: as they were computed, or approximately."""


@dataclass(frozen=True)
class Root:
    """What a representation depends on besides the tokens before it.

    Parameters
    ----------
    weights_id : digest of everything that decides a forward pass, hex.
    tokenizer_id : digest of everything that turns text into IDs, hex.
    namespace : salt of a tenant; no lookup crosses from one namespace to another.
    intervention_id : digest of hooks that change activations; empty for the plain model.
    kv_codec : how keys and values are approximated where they are stored, ``"int8"``; empty if they are exact.

    Notes
    -----
    Immutable and thread safe. ``digest`` is computed once for equal fields, in microseconds.
    """

    weights_id: str
    tokenizer_id: str
    namespace: str = ""
    intervention_id: str = ""
    kv_codec: str = ""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, str):
                raise InputTypeError(f"{name} must be a str, not {type(value).__name__}")
            if not value.isascii():
                _check_unicode(name, value)

    @property
    def digest(self) -> bytes:
        """32 bytes, equal on every machine for equal fields."""
        return _root_digest(self.weights_id, self.tokenizer_id, self.namespace, self.intervention_id, self.kv_codec)


def known_root(*fields: str) -> Root:
    """Return the root of fields, one that may have been made before: lookups ask for the same few."""
    try:
        return _root(*fields)
    except TypeError:  # what cannot be hashed; Root says what it must be
        return Root(*fields)


@lru_cache(maxsize=1024)
def _root(*fields: str) -> Root:
    return Root(*fields)


@lru_cache(maxsize=1024)
def _root_digest(weights_id: str, tokenizer_id: str, namespace: str, intervention_id: str, kv_codec: str) -> bytes:
    hasher = FieldHasher("promptdb root")
    hasher.field("version", ROOT_VERSION)
    hasher.field("weights", weights_id)
    hasher.field("tokenizer", tokenizer_id)
    hasher.field("namespace", namespace)
    hasher.field("intervention", intervention_id)
    if kv_codec:  # so that exact ones have the digest that they always had
        hasher.field("kv_codec", kv_codec)
    return hasher.digest()


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextEncodingError(f"{name} is not valid Unicode: {error}") from error


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    """Pack token IDs as little-endian uint32.

    Parameters
    ----------
    token_ids : n integers in [0, 2**32).

    Returns
    -------
    bytes
        4 n bytes.

    Raises
    ------
    TokenRangeError
        An ID is negative or does not fit.
    InputTypeError
        An item is not an integer, or bytes were given, of which nobody can tell how wide the integers are.
    """
    if isinstance(token_ids, (bytes, bytearray, memoryview)):
        raise InputTypeError(
            f"token IDs must be integers, not {type(token_ids).__name__}", "unpack_tokens() reads bytes"
        )
    if isinstance(token_ids, str):
        raise InputTypeError("token IDs must be integers, not str", "tokenise text first, or ask an Engine")
    try:
        tokens = token_ids if isinstance(token_ids, array) and token_ids.typecode == "I" else array("I", token_ids)
    except OverflowError as error:
        raise TokenRangeError(f"a token ID is outside [0, 2**32): {error}") from error
    except TypeError as error:
        raise InputTypeError(f"token IDs must be integers: {error}") from error
    if sys.byteorder == "big":
        tokens = array("I", tokens)
        tokens.byteswap()
    return tokens.tobytes()


def unpack_tokens(packed: bytes | memoryview) -> array[int]:
    """Return the token IDs of packed tokens, as an array of uint32."""
    tokens = array("I")
    tokens.frombytes(packed)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def num_tokens(packed: bytes | memoryview) -> int:
    """Return how many tokens ``packed`` holds."""
    return len(packed) // TOKEN_BYTES


def common_prefix(left: bytes | memoryview, right: bytes | memoryview) -> int:
    """Return how many tokens two packed sequences share at their start. Cost: a microsecond a thousand tokens."""
    length = min(len(left), len(right)) // TOKEN_BYTES * TOKEN_BYTES
    difference = int.from_bytes(left[:length], "little") ^ int.from_bytes(right[:length], "little")
    if not difference:
        return length // TOKEN_BYTES
    return ((difference & -difference).bit_length() - 1) // (8 * TOKEN_BYTES)  # where the lowest bit stands


class PrefixHasher:
    """Streams prefix digests of one prompt: ``at(i)`` for rising ``i``.

    Not thread safe: one per walk. Cost: one pass over the tokens, and about a microsecond per digest.
    """

    def __init__(self, root_digest: bytes, packed: bytes) -> None:
        self._packed = packed
        self._hasher = blake3(key=root_digest)
        self._position = 0

    def at(self, position: int) -> bytes:
        """Return ``d(position)``; positions must not fall."""
        if position < self._position:
            raise ValueError(f"prefix digests are streamed forward: {position} after {self._position}")
        if position > self._position:
            self._hasher.update(self._packed[self._position * TOKEN_BYTES : position * TOKEN_BYTES])
            self._position = position
        return self._hasher.digest()


def prefix_digests(root_digest: bytes, packed: bytes, positions: Sequence[int]) -> Iterator[bytes]:
    """Yield ``d(i)`` for each ``i`` of ``positions``, which must not fall."""
    hasher = PrefixHasher(root_digest, packed)
    for position in positions:
        yield hasher.at(position)


def node_id(child_hash: bytes, span: bytes) -> bytes:
    """Return the node ID of the span with packed tokens ``span``, conditioned on ``child_hash``."""
    return blake3(span, key=child_hash).digest()


def child_key(child_hash: bytes, following: bytes) -> bytes:
    """Return the key in the child index of the span that goes on with packed tokens ``following``. 36 bytes."""
    return child_hash + following[TOKEN_BYTES - 1 :: -1]
