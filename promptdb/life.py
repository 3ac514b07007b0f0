"""What a store knows of a span besides its record: who stands on it, its bytes, its last use, when it may go.

Also the records that say what the store holds and may hold in all. FORMAT.md is the specification.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from promptdb.errors import CorruptDataError
from promptdb.format import CHECKSUM_BYTES, META, checksum, pack_record, unpack_record
from promptdb.hashing import FieldHasher
from promptdb.keys import DIGEST_BYTES
from promptdb.tables import Reader, Writer

LIMITS_KEY = b"limits"
USAGE_KEY = b"usage"
TTL_KEY = b"ttl:"

POLICIES = ("cost", "lru", "fifo", "ttl")
DEFAULT_POLICY = "cost"
COMPRESSIONS = ("off", "zstd")
DEFAULT_COMPRESSION = "off"

PAGE_BYTES = 4096
LARGEST_SMALL_ITEM = 2030
NODE_BYTES = 256
"""What a node is charged for its entries in ``life`` and ``queue``, and its share of everything else."""

NEVER = math.inf

_FIXED = struct.Struct("<IQdddddd")
_TIMES = struct.Struct("<dd")
_TIMES_AT = CHECKSUM_BYTES + DIGEST_BYTES + 12
_SORTED = struct.Struct(">d")
_EXPIRY_CLASS, _PRIORITY_CLASS = b"\x00", b"\x01"
QUEUE_NODE_AT = 1 + _SORTED.size


def charge(key_bytes: int, value_bytes: int) -> int:
    """Return what an item counts for: its bytes; of one too large for a page of LMDB's trees, whole pages.

    Parameters
    ----------
    key_bytes, value_bytes : as they are stored: :meth:`promptdb.tables.Reader.stored_sizes`.
    """
    if key_bytes + value_bytes <= LARGEST_SMALL_ITEM:
        return key_bytes + value_bytes
    return key_bytes + PAGE_BYTES * -(-(value_bytes + 16) // PAGE_BYTES)


@dataclass(slots=True)
class Life:
    """What changes about a stored span. Times are seconds since 1970; mutable, belongs to one transaction.

    Attributes
    ----------
    parent : node ID of the span that holds the token before this one's first; empty at the start of a prompt. Without
        an entry of its own it is gone, and this span with all that stands on it cannot be found: an orphan.
    num_children : spans whose ``parent`` this one is.
    size_bytes : what the node is charged, its logits included.
    expires_unix_s : when it expires; infinite if never.
    pinned_unix_s : when the last pin on it ends; 0 if there is none.
    used_unix_s : last use that is known.
    priority : rank in the queue of what is evicted; the lowest goes first.
    compute_s, created_unix_s : as in its record.
    logits : prefix digests of the logits that go with it.
    """

    parent: bytes
    num_children: int
    size_bytes: int
    expires_unix_s: float
    pinned_unix_s: float
    used_unix_s: float
    priority: float
    compute_s: float
    created_unix_s: float
    logits: list[bytes] = field(default_factory=list)

    @property
    def ends_unix_s(self) -> float:
        """When it may no longer be returned: its expiry, or the end of its last pin, whichever is later."""
        return max(self.expires_unix_s, self.pinned_unix_s)

    def pack(self, node: bytes) -> bytes:
        """Return the bytes to store under ``node``."""
        fixed = _FIXED.pack(
            self.num_children, self.size_bytes, self.expires_unix_s, self.pinned_unix_s,
            self.used_unix_s, self.priority, self.compute_s, self.created_unix_s,
        )  # fmt: skip
        body = b"".join((self.parent or bytes(DIGEST_BYTES), fixed, *self.logits))
        return checksum(node, body) + body

    @classmethod
    def unpack(cls, node: bytes, data: bytes | memoryview) -> Life:
        """Read the entry of ``node``.

        Raises
        ------
        CorruptDataError
            The checksum does not hold, or the size cannot be.
        """
        body = bytes(data[CHECKSUM_BYTES:])
        rest = len(body) - DIGEST_BYTES - _FIXED.size
        if rest < 0 or rest % DIGEST_BYTES or checksum(node, body) != bytes(data[:CHECKSUM_BYTES]):
            raise CorruptDataError(f"the life entry of node {node[:8].hex()} does not hold", "`promptdb verify --fix`")
        parent = body[:DIGEST_BYTES]
        first = DIGEST_BYTES + _FIXED.size
        logits = [body[at : at + DIGEST_BYTES] for at in range(first, len(body), DIGEST_BYTES)]
        children, size_bytes, *times = _FIXED.unpack_from(body, DIGEST_BYTES)
        life = cls(parent if any(parent) else b"", children, size_bytes, *times)
        life.logits = logits
        return life

    def queue_keys(self, node: bytes) -> tuple[bytes, ...]:
        """Return the keys under which the node stands in the queue: none while something stands on it."""
        if self.num_children:
            return ()
        keys = []
        if self.ends_unix_s < NEVER:
            keys.append(_EXPIRY_CLASS + sortable(self.ends_unix_s) + node)
        if not self.pinned_unix_s:
            keys.append(_PRIORITY_CLASS + sortable(self.priority) + node)
        return tuple(keys)


def priority(policy: str, life: Life, inflation: float) -> float:
    """Return the rank of a node that was used just now, or whose policy has changed: the lowest is evicted first.

    ``cost`` is GreedyDual-Size: seconds that the node saves per byte, above the rank of what was evicted last; so what
    is not used sinks as others go.
    """
    if policy == "cost":
        return inflation + life.compute_s / max(life.size_bytes, 1)
    return {"lru": life.used_unix_s, "fifo": life.created_unix_s, "ttl": 0.0}[policy]


def sortable(number: float) -> bytes:
    """Return 8 bytes that sort as the number does; what is below 0 counts as 0."""
    return _SORTED.pack(max(number, 0.0))


def queue_number(key: bytes) -> float:
    """Return the time or priority of a key of the queue."""
    number: float = _SORTED.unpack_from(key, 1)[0]
    return number


def expiry_keys() -> bytes:
    """Return what the keys of the queue by expiry start with."""
    return _EXPIRY_CLASS


def priority_keys() -> bytes:
    """Return what the keys of the queue by priority start with."""
    return _PRIORITY_CLASS


def is_alive(data: memoryview | None, now: float) -> bool:
    """Return whether a node may be returned, by its entry; one without an entry may. Half a microsecond."""
    if data is None or len(data) < _TIMES_AT + _TIMES.size:
        return True
    expires, pinned = _TIMES.unpack_from(data, _TIMES_AT)
    return bool(expires > now or pinned > now)


@dataclass(frozen=True)
class Limits:
    """What a store may hold, and how blobs are stored: settings that all processes read with every put.

    ``quota_bytes`` is 0 where there is none.
    """

    quota_bytes: int = 0
    policy: str = DEFAULT_POLICY
    compression: str = DEFAULT_COMPRESSION

    def write(self, writer: Writer) -> None:
        """Store the settings."""
        fields = asdict(self)
        if self.compression == DEFAULT_COMPRESSION:  # as every version of the format knows it
            del fields["compression"]
        writer.put(META, LIMITS_KEY, pack_record(LIMITS_KEY, fields))


def read_limits(reader: Reader) -> Limits:
    """Return the limits of a store; raises :class:`CorruptDataError`."""
    found = _fields(reader, LIMITS_KEY)
    if found is None:
        return Limits()
    limits = Limits(
        found.get("quota_bytes", 0),
        found.get("policy", DEFAULT_POLICY),
        found.get("compression", DEFAULT_COMPRESSION),
    )
    is_sound = type(limits.quota_bytes) is int and limits.quota_bytes >= 0
    if not is_sound or limits.policy not in POLICIES or limits.compression not in COMPRESSIONS:
        raise CorruptDataError("the store's limits cannot be", "set them again: `promptdb limits`")
    return limits


@dataclass
class Usage:
    """What a store holds in all, kept in every transaction that changes it. Mutable.

    Attributes
    ----------
    charged_bytes, pinned_bytes : of all nodes, and of those that are pinned.
    num_orphans : nodes whose ``parent`` is gone.
    next_pin_unix_s : when the first of the pins ends; infinite if there is none.
    inflation : priority of the last node that was evicted by cost.
    num_evicted, evicted_bytes, num_expired, expired_bytes : what went since the store was created.
    room_bytes : what the disk had room for when it was full; 0 if it never was, or is no longer.
    """

    charged_bytes: int = 0
    pinned_bytes: int = 0
    num_orphans: int = 0
    next_pin_unix_s: float = NEVER
    inflation: float = 0.0
    num_evicted: int = 0
    evicted_bytes: int = 0
    num_expired: int = 0
    expired_bytes: int = 0
    room_bytes: int = 0

    def write(self, writer: Writer) -> None:
        """Store the totals."""
        writer.put(META, USAGE_KEY, pack_record(USAGE_KEY, vars(self)))


def read_usage(reader: Reader) -> Usage | None:
    """Return the totals of a store, or None if it has none: it was not written since format version 1.

    Raises
    ------
    CorruptDataError
        The record does not hold.
    """
    found = _fields(reader, USAGE_KEY)
    if found is None:
        return None
    usage = Usage(**{each.name: found[each.name] for each in fields(Usage) if each.name in found})
    for name, value in vars(usage).items():
        is_time = name in ("next_pin_unix_s", "inflation")
        if type(value) is not (float if is_time else int) or not value >= 0:
            raise CorruptDataError(f"the store's totals cannot be: {name} is {value!r}", "`promptdb verify --fix`")
    return usage


def _fields(reader: Reader, key: bytes) -> dict[str, Any] | None:
    data = reader.get(META, key)
    return None if data is None else unpack_record(key, data)


def _ttl_key(namespace: str) -> bytes:
    hasher = FieldHasher("promptdb namespace")
    hasher.field("namespace", namespace)
    return TTL_KEY + hasher.digest()


def read_ttl(reader: Reader, namespace: str) -> float | None:
    """Return how long spans of a namespace live, in seconds, or None if nothing is set."""
    key = _ttl_key(namespace)
    found = _fields(reader, key)
    return None if found is None else _ttl_of(found)[1]


def read_ttls(reader: Reader) -> dict[str, float]:
    """Return all times to live by namespace."""
    found = {}
    for key, data in reader.scan(META, prefix=TTL_KEY):
        namespace, ttl_s = _ttl_of(unpack_record(key, data))
        found[namespace] = ttl_s
    return found


def _ttl_of(found: Mapping[str, Any]) -> tuple[str, float]:
    namespace, ttl_s = found.get("namespace"), found.get("ttl_s")
    if type(namespace) is not str or type(ttl_s) is not float or not ttl_s > 0:
        raise CorruptDataError("a namespace's time to live cannot be", "set it again: `promptdb limits --ttl`")
    return namespace, ttl_s


def write_ttl(writer: Writer, namespace: str, ttl_s: float | None) -> None:
    """Set how long spans of a namespace live, or, with None, that they live for ever."""
    key = _ttl_key(namespace)
    if ttl_s is None:
        writer.delete(META, key)
    else:
        writer.put(META, key, pack_record(key, {"namespace": namespace, "ttl_s": ttl_s}))
