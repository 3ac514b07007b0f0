"""A far store whose engine sees neither tokens nor numbers: names hidden and values sealed with a team's key.

A value is sealed together with its key, so that nobody without the team's key can make one, change it, or put it in
another's place. A mark says that a store is sealed, and with which key: who has another one, or none, adds nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import islice

from blake3 import blake3

from promptdb.errors import SharedError
from promptdb.events import warn
from promptdb.far import MARK, Bytes, FarStore, Pieces, joined
from promptdb.sealing import SEAL_BYTES, Sealer

_MARKED = b"promptdb shared store"
_TEAM = "promptdb 2026-11 shared store"
# Of what measures the store, nothing stays.
_PROBES = "x/"
_ROOTS = "r/"
_MOST_GROUPS = 1000


class FarSealed:
    """A far store behind a key; see :class:`promptdb.far.FarStore` for the contract.

    Parameters
    ----------
    far : what holds the sealed values.
    key : 32 bytes that the team shares, and the engine's operator does not know.

    Notes
    -----
    The first operation asks for the mark, which is a round trip more. A store with a mark of another key, and one with
    values that are not sealed, fail with :class:`SharedError`. Sealing adds 40 bytes to a value.
    """

    def __init__(self, far: FarStore, key: bytes) -> None:
        self._far = far
        self._sealer = Sealer(blake3(key, derive_key_context=_TEAM).digest())
        self._lock = threading.Lock()
        self._is_checked = self._is_marked = False
        self._groups: dict[tuple[str, str], str] = {}
        self._has_told = False
        self.name = far.name
        self.first_batch = far.first_batch
        self.has_leases = far.has_leases

    # Names: the kind of a key stays as it is, and each part after it is hidden by itself, so that groups can be listed.

    def _hidden(self, key: str) -> str:
        kind, *parts = key.split("/")
        hidden = [kind]
        for number, part in enumerate(parts):
            is_group = number + 1 < len(parts)
            hidden.append(self._group(kind, part) if is_group else self._hide(kind, "name", part) if part else "")
        return "/".join(hidden)

    def _group(self, kind: str, part: str) -> str:
        found = self._groups.get((kind, part))
        if found is None:
            if len(self._groups) >= _MOST_GROUPS:
                self._groups.clear()
            found = self._groups[kind, part] = self._hide(kind, "group", part)
        return found

    def _hide(self, kind: str, what: str, part: str) -> str:
        return self._sealer.hide(f"{kind} {what}".encode(), part.encode()).hex()

    def _plain(self, hidden: str) -> str | None:
        """Return a key, or None if it is none of this team's."""
        kind, *parts = hidden.split("/")
        found = [kind]
        for number, part in enumerate(parts):
            what = "group" if number + 1 < len(parts) else "name"
            try:
                plain = self._sealer.reveal(f"{kind} {what}".encode(), bytes.fromhex(part))
            except ValueError:
                return None
            if plain is None:
                return None
            found.append(plain.decode())
        return "/".join(found)

    # Values

    def _opened(self, key: str, pieces: Pieces | None) -> Pieces | None:
        """Return a value. One that cannot be opened is empty, as nothing of ours is: so it is damage, and taken out."""
        if pieces is None:
            return None
        value = self._sealer.open(key.encode(), joined(pieces))
        if value is None:
            if not self._has_told:
                warn(
                    "shared_unreadable", f"{self.name}: a value was changed there, or sealed by others: it is not used"
                )
            self._has_told = True
            return [b""]
        return [value]

    # The mark

    def _ready(self, *, to_write: bool = False) -> FarStore:
        """Return the far store once it is known to be this team's, or empty; mark it before the first value."""
        with self._lock:
            if self._is_marked or (self._is_checked and not to_write):
                return self._far
            (found,) = self._far.get([MARK])
            if found is None and to_write:
                self._check_empty()
                self._far.put([(MARK, self._sealer.seal(MARK.encode(), _MARKED))])
                (found,) = self._far.get([MARK])
            if found is not None and self._sealer.open(MARK.encode(), joined(found)) is None:
                raise SharedError(
                    f"{self.name}: it is encrypted with another key",
                    "PROMPTDB_SHARED_KEY (or _FILE) is not the team's key; a new key needs a new prefix",
                )
            self._is_checked, self._is_marked = True, found is not None
            return self._far

    def _check_empty(self) -> None:
        for key in islice(self._far.list(_ROOTS), _MOST_GROUPS):
            if len(key) <= len(_ROOTS) + 64:
                raise SharedError(
                    f"{self.name}: it holds what is not encrypted",
                    "choose another prefix or path for what is, and delete the old one",
                )

    # The contract

    def exists(self, keys: Sequence[str]) -> list[bool]:
        """Return which values are there; whether they can be opened is not looked at."""
        return self._ready().exists([self._hidden(key) for key in keys])

    def get(self, keys: Sequence[str], sizes: Sequence[int] | None = None) -> list[Pieces | None]:
        """Return values; what cannot be opened is empty."""
        known = None if sizes is None else [size + SEAL_BYTES for size in sizes]
        found = self._ready().get([self._hidden(key) for key in keys], known)
        return [self._opened(key, pieces) for key, pieces in zip(keys, found, strict=True)]

    def put(self, items: Sequence[tuple[str, Bytes]]) -> list[bool]:
        """Seal values, and create them."""
        far = self._ready(to_write=any(not key.startswith(_PROBES) for key, _ in items))
        return far.put([(self._hidden(key), self._sealer.seal(key.encode(), value)) for key, value in items])

    def delete(self, keys: Sequence[str]) -> None:
        """Remove values."""
        self._ready().delete([self._hidden(key) for key in keys])

    def lease(self, keys: Sequence[str], holder: str, ttl_s: float) -> list[float]:
        """Take keys, by their hidden names."""
        return self._ready().lease([self._hidden(key) for key in keys], holder, ttl_s)

    def release(self, keys: Sequence[str], holder: str) -> None:
        """Give them back."""
        self._ready().release([self._hidden(key) for key in keys], holder)

    def list(self, prefix: str) -> Iterator[str]:
        """Yield keys that this team's key reveals."""
        kind, *groups = prefix.rstrip("/").split("/")
        hidden = "/".join([kind, *(self._group(kind, group) for group in groups), ""])
        for name in self._ready().list(hidden):
            key = self._plain(name)
            if key is not None:
                yield key

    def facts(self) -> dict[str, str | int]:
        """Return what the far side says of itself."""
        return {**self._ready().facts(), "encrypted": "with the team's key"}

    def close(self) -> None:
        """Release connections."""
        self._far.close()
