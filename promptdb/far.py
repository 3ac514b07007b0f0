"""What the shared tier needs of an engine on other machines: values under keys, in batches.

Implementations: :mod:`promptdb.far_redis`, :mod:`promptdb.far_objects`, and :mod:`promptdb.far_layers`, one in front of
another. One contract suite, :mod:`promptdb.testing_shared`, runs on all of them against real servers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from promptdb.errors import SharedError


class TooLargeError(SharedError):
    """A value that the far side should not hold, however often it is tried."""


MARK = "k/sealed"
"""Key of what says that a store is encrypted; see :mod:`promptdb.far_sealed`."""

Bytes = bytes | bytearray | memoryview
Pieces = Sequence[Bytes]  # of one value, in order: joining them would be a copy


class FarStore(Protocol):
    """Values under keys, on other machines. Thread safe.

    Keys are ASCII: parts of letters, digits, ``.``, ``-`` and ``_``, joined by ``/``. Values are created whole, never
    changed. A value may vanish at any time, or lose a part; then it is a miss. Every method raises
    :class:`~promptdb.errors.SharedError`, with what to do about it, if the far side fails or refuses, within the
    timeouts of its options for each round trip.

    Attributes
    ----------
    name : where it is, without secrets.
    first_batch : how many keys may be asked for at once before it is slow.
    has_leases : whether :meth:`lease` takes anything: what ends by itself must be cheap.
    """

    name: str
    first_batch: int
    has_leases: bool

    def exists(self, keys: Sequence[str]) -> list[bool]:
        """Return which values are there, whole. Counts as a use of them, where the engine evicts by use."""

    def get(self, keys: Sequence[str], sizes: Sequence[int] | None = None) -> list[Pieces | None]:
        """Return values, None for a miss. ``sizes`` in bytes, where they are known, may save a round trip."""

    def put(self, items: Sequence[tuple[str, Bytes]]) -> list[bool]:
        """Create values; return for each whether it was, or False if the key has one. All or nothing of each shows."""

    def delete(self, keys: Sequence[str]) -> None:
        """Remove values, and what is left of broken ones."""

    def lease(self, keys: Sequence[str], holder: str, ttl_s: float) -> list[float]:
        """Take keys, which have no values, for a time, unless others have them.

        Returns for each 0, or the seconds that another holder still has it for. A hint: nothing is kept from anybody.
        """

    def release(self, keys: Sequence[str], holder: str) -> None:
        """Give back what a holder took, as far as it has it."""

    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys under a prefix that ends with ``/``, in any order. Slow; what is put meanwhile may show."""

    def facts(self) -> dict[str, str | int]:
        """Return what the far side says of itself, to be shown: version, limits, use. Empty if it may not."""

    def close(self) -> None:
        """Release connections. Closing twice is harmless."""


def joined(pieces: Pieces) -> bytes:
    """Return a value's bytes in one piece."""
    return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)


def check_not_sealed(far: FarStore) -> None:
    """Raise :class:`SharedError` if a store is sealed, for those who have no key: what they send could be read."""
    (mark,) = far.get([MARK])
    if mark is not None:
        raise SharedError(
            f"{far.name}: it is encrypted, and there is no key",
            "set PROMPTDB_SHARED_KEY or PROMPTDB_SHARED_KEY_FILE to the team's key",
        )
