"""Which prompts were used lately: noted in memory by every lookup, written now and then."""

from __future__ import annotations

from collections.abc import Mapping

MAX_PENDING = 1 << 16
MANY_PENDING = 1 << 15


class AccessLog:
    """Uses of prompts that are not written yet, each by the last span of its path.

    Thread safe without a lock, so that a child that is forked meanwhile inherits none that is held: every operation is
    one of a dict's own. Bounded: when :data:`MAX_PENDING` wait, more are not noted. A third of a microsecond a lookup.
    """

    def __init__(self) -> None:
        self._used: dict[bytes, float] = {}

    def touch(self, node: bytes, now: float) -> None:
        """Note a use of a span and of all that it stands on."""
        if len(self._used) < MAX_PENDING:
            self._used[node] = now

    @property
    def has_many(self) -> bool:
        """Whether so many wait that they should be written."""
        return len(self._used) >= MANY_PENDING

    def take(self, most: int) -> dict[bytes, float]:
        """Return up to ``most`` spans with the time of their last use; they no longer wait."""
        taken = {}
        for _ in range(most):
            try:
                node, used = self._used.popitem()
            except KeyError:
                break
            taken[node] = used
        return taken

    def put_back(self, taken: Mapping[bytes, float]) -> None:
        """Let spans wait again that could not be written."""
        for node, used in taken.items():
            self._used.setdefault(node, used)
