"""What the bytes of a store mean: tables, versions, checksums and records. FORMAT.md is the specification.

A record is ``checksum || msgpack``. The checksum is XXH3-128 of the msgpack bytes, seeded with the start of the key
under which the record stands, so that a record that was moved to another key does not pass for that key's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import msgpack
from xxhash import xxh3_128_digest

from promptdb.errors import CorruptDataError
from promptdb.keys import DIGEST_BYTES, TOKEN_BYTES, Root, num_tokens

FORMAT_VERSION = 3

# Named tables. Keys and values: FORMAT.md.
META = "meta"
ROOTS = "roots"
NODES = "nodes"
CHILDREN = "children"
BLOBS = "blobs"
LOGITS = "logits"
MODELS = "models"
TOKENIZERS = "tokenizers"
CHECKPOINTS = "checkpoints"
LIFE = "life"
QUEUE = "queue"
LABELS = "labels"
ACTIVATIONS = "activations"
OUTBOX = "outbox"
ARTIFACTS = "artifacts"
TABLES = (
    META, ROOTS, NODES, CHILDREN, BLOBS, LOGITS, MODELS, TOKENIZERS, CHECKPOINTS, LIFE, QUEUE, LABELS, ACTIVATIONS,
    OUTBOX, ARTIFACTS,
)  # fmt: skip

STORE_KEY = b"store"
SEAL_KEY = b"seal"  # where an encrypted store keeps what opens it
KV_BLOB = "kv"
LOGPROBS_BLOB = "lp"

CHECKSUM_BYTES = 16

# A hostile record may claim any length; these bound what is allocated before the claim is known to be false.
MAX_RECORD_BYTES = 64 * 1024 * 1024
MAX_RECORD_ITEMS = 1 << 16
MAX_RECORD_VALUES = 1 << 17  # in all arrays and maps of a record together
_SMALL_RECORD_BYTES = 1 << 14  # too short to take much memory whatever it holds: values are not counted


def checksum(key: bytes, content: bytes | bytearray | memoryview) -> bytes:
    """Return the 16-byte checksum of ``content`` as stored under ``key``. About 10 GB/s."""
    return xxh3_128_digest(content, seed=int.from_bytes(key[:8], "little"))


def pack_record(key: bytes, fields: Mapping[str, Any]) -> bytes:
    """Return the bytes of a record for ``key``."""
    body: bytes = msgpack.packb(fields, use_bin_type=True)
    return checksum(key, body) + body


def unpack_record(key: bytes, data: bytes | memoryview) -> dict[str, Any]:
    """Read a record that stands under ``key``.

    Raises
    ------
    CorruptDataError
        The checksum does not hold, or the bytes are not a map of the expected size.
    """
    if not CHECKSUM_BYTES < len(data) <= MAX_RECORD_BYTES:
        raise CorruptDataError(f"a record of {len(data)} bytes under {key[:8].hex()}")
    body = bytes(data[CHECKSUM_BYTES:])
    if checksum(key, body) != bytes(data[:CHECKSUM_BYTES]):
        raise CorruptDataError(f"the checksum of the record under {key[:8].hex()} does not hold")
    try:
        if len(body) > _SMALL_RECORD_BYTES:
            _check_number_of_values(body)
        fields = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=True,
            max_bin_len=len(body),
            max_str_len=len(body),
            max_array_len=min(len(body), MAX_RECORD_ITEMS),
            max_map_len=min(len(body), MAX_RECORD_ITEMS),
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise CorruptDataError(f"the record under {key[:8].hex()} is not readable: {error}") from error
    if not isinstance(fields, dict):
        raise CorruptDataError(f"the record under {key[:8].hex()} is not a map")
    return fields


# Codes of msgpack with a number behind them: how wide it is, and how many values follow for each that it counts.
_COUNTS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}  # arrays and maps
_LENGTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}  # bytes and text
_NUMBERS = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_PLAIN = (0xC0, 0xC2, 0xC3)  # nil, false, true


def _check_number_of_values(body: bytes) -> None:
    """Raise ValueError if msgpack bytes hold so many values that reading them would take much memory.

    Looks at codes and lengths only: a value is an object of 30 to 80 bytes, but may be one byte here.
    """
    at, seen, expected = 0, 0, 1
    while seen < expected <= MAX_RECORD_VALUES:
        if at >= len(body):
            raise ValueError("it ends in the middle of a value")
        code = body[at]
        at, seen = at + 1, seen + 1
        if code <= 0x7F or code >= 0xE0 or code in _PLAIN:
            continue
        if code <= 0x9F:
            expected += (code & 0x0F) * (2 if code <= 0x8F else 1)
        elif code <= 0xBF:
            at += code & 0x1F
        elif code in _COUNTS:
            width, values = _COUNTS[code]
            expected += values * int.from_bytes(body[at : at + width], "big")
            at += width
        elif code in _LENGTHS:
            width = _LENGTHS[code]
            at += width + int.from_bytes(body[at : at + width], "big")
        elif code in _NUMBERS:
            at += _NUMBERS[code]
        else:
            raise ValueError(f"code {code:#x}")
    if expected > MAX_RECORD_VALUES:
        raise ValueError(f"more than {MAX_RECORD_VALUES:,} values")


TOTALS = ("num_nodes", "num_tokens", "blob_bytes")


def pack_root(root: Root, totals: Mapping[str, int]) -> bytes:
    """Return the record of a root with its totals, to stand under the root's digest."""
    return pack_record(root.digest, {"root": _root_fields(root), "totals": dict(totals)})


def unpack_root(digest: bytes, data: bytes | memoryview) -> tuple[Root, dict[str, int]]:
    """Read the record under a root's digest; raises :class:`CorruptDataError`. Unknown fields are ignored."""
    fields = unpack_record(digest, data)
    try:
        root, totals = _read_root(fields["root"]), {name: fields["totals"][name] for name in TOTALS}
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptDataError(f"the record of root {digest[:8].hex()} lacks or garbles a field: {error!r}") from error
    if not all(map(_is_size, totals.values())):
        raise CorruptDataError(f"the record of root {digest[:8].hex()} has totals that cannot be")
    return root, totals


def _read_root(fields: Mapping[str, Any]) -> Root:
    exact = fields["weights_id"], fields["tokenizer_id"], fields["namespace"], fields["intervention_id"]
    return _root(*exact, fields.get("kv_codec", ""))


# A store has few identities and layouts, and a lookup reads many records: each is checked once.
_root = lru_cache(maxsize=256, typed=True)(Root)


def _root_fields(root: Root) -> dict[str, str]:
    found = dict(vars(root))  # asdict() takes longer than all the rest of a record
    if not root.kv_codec:  # as every version of the format knows it
        del found["kv_codec"]
    return found


@dataclass(frozen=True)
class Group:
    """Keys or values of layers that share a shape, stored as one tensor ``[slots, kv_heads, tokens, head_dim]``.

    ``slots`` names them in order: ``2 * layer`` for keys, ``2 * layer + 1`` for values.
    """

    slots: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: str  # safetensors' name: F32, BF16, ...

    def span_shape(self, tokens: int) -> tuple[int, int, int, int]:
        """Return the tensor's shape for a span of ``tokens`` tokens."""
        return (len(self.slots), self.kv_heads, tokens, self.head_dim)


Layout = tuple[Group, ...]


@lru_cache(maxsize=256, typed=True)
def _group(slots: tuple[int, ...], kv_heads: int, head_dim: int, dtype: str) -> Group:
    """Return a group as a record has it; raises ValueError for what cannot be."""
    if not all(map(_is_size, (*slots, kv_heads, head_dim))) or type(dtype) is not str:
        raise ValueError("a layout that cannot be")
    return Group(tuple(int(slot) for slot in slots), kv_heads, head_dim, dtype)


class BlobEntry(NamedTuple):
    """Size in bytes and checksum of one blob of a node."""

    size_bytes: int
    checksum: bytes

    def is_sound(self) -> bool:
        """Whether the fields can be what they are said to be."""
        return _is_size(self.size_bytes) and type(self.checksum) is bytes and len(self.checksum) == CHECKSUM_BYTES


class NodeRecord(NamedTuple):  # one is made for every span that is read: a frozen dataclass takes twice as long
    """One stored span ``[start, start + len(span))`` of a prompt, without its tensors.

    Immutable. All key fields stand here in the clear, so that a node can be checked, listed and moved by itself.
    """

    root: Root
    parent: bytes  # node ID of the span that this one stands on; empty at the start of a prompt
    child_hash: bytes
    start: int
    span: bytes  # packed tokens
    layout: Layout
    blobs: Mapping[str, BlobEntry]
    created_unix_s: float
    compute_s: float
    provenance: Mapping[str, str | int | float]

    @property
    def num_tokens(self) -> int:
        """Length of the span in tokens."""
        return num_tokens(self.span)

    @property
    def end(self) -> int:
        """Position after the span's last token."""
        return self.start + self.num_tokens

    @property
    def size_bytes(self) -> int:
        """Bytes of all blobs of the node."""
        return sum(blob.size_bytes for blob in self.blobs.values())

    def pack(self, node: bytes) -> bytes:
        """Return the record's bytes, to stand under node ID ``node``."""
        return pack_record(
            node,
            {
                "root": _root_fields(self.root),
                "parent": self.parent,
                "child_hash": self.child_hash,
                "start": self.start,
                "tokens": self.span,
                "layout": [[list(group.slots), group.kv_heads, group.head_dim, group.dtype] for group in self.layout],
                "blobs": {kind: [blob.size_bytes, blob.checksum] for kind, blob in self.blobs.items()},
                "created_unix_s": self.created_unix_s,
                "compute_s": self.compute_s,
                "provenance": dict(self.provenance),
            },
        )

    @classmethod
    def unpack(cls, node: bytes, data: bytes | memoryview) -> NodeRecord:
        """Read the record under node ID ``node``; unknown fields are ignored.

        Raises
        ------
        CorruptDataError
            The checksum does not hold, or a field is missing or cannot be.
        """
        fields = unpack_record(node, data)
        try:
            record = cls(
                root=_read_root(fields["root"]),
                parent=fields["parent"],
                child_hash=fields["child_hash"],
                start=fields["start"],
                span=fields["tokens"],
                layout=tuple(
                    _group(tuple(slots), kv_heads, head_dim, dtype)
                    for slots, kv_heads, head_dim, dtype in fields["layout"]
                ),
                blobs={kind: BlobEntry(size, digest) for kind, (size, digest) in fields["blobs"].items()},
                created_unix_s=fields["created_unix_s"],
                compute_s=fields["compute_s"],
                provenance=fields["provenance"],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptDataError(
                f"the record of node {node[:8].hex()} lacks or garbles a field: {error!r}"
            ) from error
        if not record._is_sound():
            raise CorruptDataError(f"the record of node {node[:8].hex()} has a field that cannot be")
        return record

    def _is_sound(self) -> bool:
        return (
            _is_digest(self.child_hash)
            and (_is_digest(self.parent) or self.parent == b"")
            and _is_size(self.start)
            and type(self.span) is bytes
            and len(self.span) > 0
            and len(self.span) % TOKEN_BYTES == 0
            and set(map(type, self.blobs)) <= {str}
            and all(map(BlobEntry.is_sound, self.blobs.values()))
            and type(self.created_unix_s) is float
            and type(self.compute_s) in (float, int)
            and type(self.provenance) is dict
        )


def _is_digest(value: object) -> bool:
    return type(value) is bytes and len(value) == DIGEST_BYTES


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
