"""Tables whose content is encrypted: a wrapper around any index. Whoever uses it sees plain keys and values.

What stands in the tables below is specified in FORMAT.md. Every value is sealed together with its table and key, so
that one which is changed or moved is noticed: it then reads as empty, which nothing takes for a record, an entry or a
blob, so it is treated as any damage. A key that was changed is given as it stands, as an :class:`UnreadableKey`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from promptdb.errors import CorruptDataError, FormatVersionError, StoreKeyError
from promptdb.events import warn
from promptdb.format import (
    ACTIVATIONS,
    CHILDREN,
    LABELS,
    META,
    OUTBOX,
    QUEUE,
    SEAL_KEY,
    STORE_KEY,
    pack_record,
    unpack_record,
)
from promptdb.keys import DIGEST_BYTES
from promptdb.life import QUEUE_NODE_AT
from promptdb.sealing import HIDDEN_BYTES, SEAL_BYTES, Sealer
from promptdb.tables import Index, Item, Reader, Reading, Result, Writer

CIPHERS = "XAES-256-GCM, AES-256-SIV"

# What must be read before the store is unlocked; both are records with a checksum.
PLAIN_KEYS = (STORE_KEY, SEAL_KEY)

_TIME_AND_KIND_BYTES = 9  # of the outbox

# By table, how keys begin: so many bytes that are not hidden, as their order counts, and so many that are hidden by
# themselves, as keys with the same ones are looked for together. All of the keys of other tables is hidden as one.
_STARTS = {
    QUEUE: (QUEUE_NODE_AT, 0),
    CHILDREN: (0, DIGEST_BYTES),
    LABELS: (1, DIGEST_BYTES),
    ACTIVATIONS: (0, DIGEST_BYTES),
    OUTBOX: (_TIME_AND_KIND_BYTES, 0),
}


class UnreadableKey(bytes):
    """A key as it stands in the tables, which this store has not hidden. It can be deleted by itself."""


class _Keys:
    """Translates keys between what the user of the tables sees and what is stored."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def stored(self, table: str, key: bytes) -> bytes:
        if isinstance(key, UnreadableKey) or _is_plain(table, key):
            return bytes(key)
        clear, group = _STARTS.get(table, (0, 0))
        if not group or len(key) < clear + group:
            return key[:clear] + self._hide(b"rest", table, key[:clear], key[clear:])
        first = self._hide(b"group", table, key[:clear], key[clear : clear + group])
        return key[:clear] + first + self._hide(b"more", table, key[: clear + group], key[clear + group :])

    def stored_prefix(self, table: str, prefix: bytes) -> bytes:
        """Return what every stored key of a prefix begins with: as much as can be told."""
        clear, group = _STARTS.get(table, (0, 0))
        if group and len(prefix) >= clear + group:
            return prefix[:clear] + self._hide(b"group", table, prefix[:clear], prefix[clear : clear + group])
        return prefix[:clear]

    def plain(self, table: str, stored: bytes) -> bytes:
        if _is_plain(table, stored):
            return stored
        clear, group = _STARTS.get(table, (0, 0))
        head, body = stored[:clear], stored[clear:]
        if group and len(body) >= group + HIDDEN_BYTES:
            first = self._reveal(b"group", table, head, body[: group + HIDDEN_BYTES])
            rest = body[group + HIDDEN_BYTES :]
            more = self._reveal(b"more", table, head + first, rest) if first is not None else None
            if first is not None and more is not None:
                return head + first + more
        rest_of_it = self._reveal(b"rest", table, head, body)
        return UnreadableKey(stored) if rest_of_it is None else head + rest_of_it

    def _hide(self, role: bytes, table: str, before: bytes, part: bytes) -> bytes:
        return self._sealer.hide(_context(role, table, before), part) if part else b""

    def _reveal(self, role: bytes, table: str, before: bytes, part: bytes) -> bytes | None:
        return self._sealer.reveal(_context(role, table, before), part) if part else b""


def _is_plain(table: str, key: bytes) -> bool:
    return table == META and key in PLAIN_KEYS


def _context(role: bytes, table: str, before: bytes) -> bytes:
    return b"%b\0%b\0%b" % (role, table.encode(), before)


class _SealedTransaction:
    """A :class:`promptdb.tables.Writer` over one of the index below."""

    __slots__ = ("_inner", "_keys", "_sealer")

    def __init__(self, inner: Writer, sealer: Sealer) -> None:
        self._inner = inner
        self._sealer = sealer
        self._keys = _Keys(sealer)

    def get(self, table: str, key: bytes) -> memoryview | None:
        sealed = self._inner.get(table, self._keys.stored(table, key))
        return None if sealed is None else self._open(table, key, sealed)

    def _open(self, table: str, key: bytes, sealed: memoryview) -> memoryview:
        if _is_plain(table, key):
            return sealed
        value = self._sealer.open(_context(b"value", table, key), sealed)
        if value is None:
            warn("value_unreadable", f"a value of table {table} was damaged, or is not this key's", table=table)
            return memoryview(b"")
        return value

    def size(self, table: str, key: bytes) -> int | None:
        size_bytes = self._inner.size(table, self._keys.stored(table, key))
        if size_bytes is None or _is_plain(table, key):
            return size_bytes
        return max(0, size_bytes - SEAL_BYTES)

    def scan(self, table: str, start: bytes = b"", prefix: bytes = b"") -> Iterator[Item]:
        for key, stored in self._found(table, start, prefix):
            sealed = self._inner.get(table, stored)
            if sealed is not None:
                yield key, self._open(table, key, sealed)

    def keys(self, table: str, prefix: bytes = b"") -> Iterator[bytes]:
        return (key for key, _ in self._found(table, b"", prefix))

    def _found(self, table: str, start: bytes, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, stored key) in the order of keys."""
        stored = self._inner.keys(table, self._keys.stored_prefix(table, prefix))
        pairs = ((self._keys.plain(table, each), each) for each in stored)
        found = (pair for pair in pairs if pair[0] >= start and pair[0].startswith(prefix))
        # What is not hidden of these keys orders them but for ties, which any order will do; and they may be many.
        return found if table in (QUEUE, OUTBOX) else iter(sorted(found))

    def count(self, table: str) -> int:
        return self._inner.count(table)

    def stored_sizes(self, table: str, key_bytes: int, value_bytes: int) -> tuple[int, int]:
        clear, group = _STARTS.get(table, (0, 0))
        num_parts = 2 if group and key_bytes > clear + group else 1
        return self._inner.stored_sizes(table, key_bytes + num_parts * HIDDEN_BYTES, value_bytes + SEAL_BYTES)

    def put(self, table: str, key: bytes, value: bytes | bytearray | memoryview) -> None:
        if not _is_plain(table, key):
            value = self._sealer.seal(_context(b"value", table, key), value)
        self._inner.put(table, self._keys.stored(table, key), value)

    def delete(self, table: str, key: bytes) -> bool:
        return self._inner.delete(table, self._keys.stored(table, key))


class SealedIndex:
    """An index whose content is encrypted. See :class:`promptdb.tables.Index` for the contract.

    Parameters
    ----------
    inner : where it is stored. Belongs to this index from now on.
    sealer : the store's.

    Notes
    -----
    Thread safe, as ``inner`` is. Scans other than of the queue, of one digest's children and of one span's labels read
    all keys of the table and sort them: some 10 microseconds a key, and 200 bytes of memory.
    """

    def __init__(self, inner: Index, sealer: Sealer) -> None:
        self.readonly = inner.readonly
        self._inner = inner
        self._sealer = sealer

    @contextmanager
    def read(self) -> Iterator[Reader]:
        """Hold a snapshot; see :meth:`promptdb.tables.Index.read`."""
        with self._inner.read() as reader:
            yield sealed_writer(reader, self._sealer)

    def transact(self, work: Callable[[Writer], Result], *, frees: bool = False) -> Result:
        """Run ``work`` and commit it; see :meth:`promptdb.tables.Index.transact`."""
        return self._inner.transact(lambda writer: work(sealed_writer(writer, self._sealer)), frees=frees)

    def stats(self) -> dict[str, int]:
        """Return sizes in bytes, and counts."""
        return self._inner.stats()

    def readings(self) -> tuple[int, list[Reading]]:
        """Return who may hold snapshots; see :meth:`promptdb.tables.Index.readings`."""
        return self._inner.readings()

    def copy(self, path: Path, *, compact: bool = False) -> None:
        """Write a consistent copy, encrypted as the original; see :meth:`promptdb.tables.Index.copy`."""
        self._inner.copy(path, compact=compact)

    def compact(self, check: Callable[[Reader], None]) -> None:
        """Give unused space back; see :meth:`promptdb.tables.Index.compact`."""
        self._inner.compact(lambda reader: check(sealed_writer(reader, self._sealer)))

    def close(self) -> None:
        """Release the store."""
        self._inner.close()

    def rewrap(self, new_key: bytes, now: float) -> None:
        """Let another user's key open the store, in one transaction."""
        self._inner.transact(lambda writer: writer.put(META, SEAL_KEY, seal_record(self._sealer, new_key, now)))


def sealed_writer(inner: Reader, sealer: Sealer) -> Writer:
    """Return a transaction's tables, decrypted. What it cannot do, such as writing to a reader's, still fails."""
    return _SealedTransaction(cast(Writer, inner), sealer)


def seal_record(sealer: Sealer, user_key: bytes, now: float) -> bytes:
    """Return the record by which a user's key opens a store."""
    fields = {"ciphers": CIPHERS, "data_key": sealer.wrap(user_key), "wrapped_unix_s": now}
    return pack_record(SEAL_KEY, fields)


def create_seal(writer: Writer, user_key: bytes, now: float) -> Writer:
    """Give a new store a data key that a user's key opens; return its tables, decrypted."""
    sealer = Sealer.new()
    writer.put(META, SEAL_KEY, seal_record(sealer, user_key, now))
    return sealed_writer(writer, sealer)


def unlock(index: Index, where: object, user_key: bytes) -> SealedIndex:
    """Return the tables of an encrypted store as its users see them.

    Parameters
    ----------
    where : path of the store, for messages.

    Raises
    ------
    StoreKeyError
        Another key opens it.
    CorruptDataError
        The record with the data key is damaged. Nothing can be read without it.
    """
    with index.read() as reader:
        data = reader.get(META, SEAL_KEY)
        record = {} if data is None else unpack_record(SEAL_KEY, data)
    if record.get("ciphers", CIPHERS) != CIPHERS:
        raise FormatVersionError(f"{where} is encrypted in a way that is not known here", "upgrade promptdb")
    wrapped = record.get("data_key")
    if type(wrapped) is not bytes:
        raise CorruptDataError(f"{where}: the record with the data key cannot be", "restore the store from a copy")
    sealer = Sealer.unwrap(wrapped, user_key)
    if sealer is None:
        raise StoreKeyError(
            f"{where} is encrypted with another key", "check PROMPTDB_KEY_FILE or PROMPTDB_KEY: was the key rotated?"
        )
    return SealedIndex(index, sealer)
