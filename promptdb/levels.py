"""Which segments of a batch run side by side as rows of one batch: same start, same length, no padding. No tensors."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from promptdb.plan import Limits, Piece
from promptdb.tree import Segment

State = TypeVar("State")


@dataclass(frozen=True)
class Row(Generic[State]):
    """A piece whose ancestors are all stored or computed, and what its owner keeps of those."""

    piece: Piece
    state: State | None


class Levels(Generic[State]):
    """Hands out rows that may run together, deepest first, so that few ancestors wait for their descendants.

    Parameters
    ----------
    segments : the tree.
    limits : ``pass_tokens`` bounds new tokens, ``cache_tokens`` all tokens of the rows together.
    """

    def __init__(self, segments: Sequence[Segment], limits: Limits) -> None:
        self._segments, self._limits = segments, limits
        # By start, deepest first: segments that are ready from there on.
        self._ready: dict[int, list[tuple[int, State | None]]] = {}
        self._starts: list[int] = []
        for number, segment in enumerate(segments):
            parent = segments[segment.parent] if segment.parent >= 0 else None
            if segment.first < segment.end and (parent is None or parent.first == parent.end):
                self._add(number, segment.first, None)

    def _add(self, number: int, start: int, state: State | None) -> None:
        if start not in self._ready:
            self._ready[start] = []
            heapq.heappush(self._starts, -start)
        self._ready[start].append((number, state))

    def take(self) -> list[Row[State]]:
        """Return rows of equal start and length, or nothing if all is computed."""
        if not self._starts:
            return []
        start = -self._starts[0]
        ready = self._ready[start]
        # Like lengths beside each other: the shortest decides how far all of them go.
        ready.sort(key=lambda entry: self._segments[entry[0]].end)
        length = min(self._segments[ready[0][0]].end - start, max(1, self._limits.pass_tokens))
        most = min(self._limits.pass_tokens // length, self._limits.cache_tokens // (start + length))
        taken, left = ready[: max(1, most)], ready[max(1, most) :]
        if left:
            self._ready[start] = left
        else:
            del self._ready[start]
            heapq.heappop(self._starts)
        return [Row(Piece(number, start, start + length), state) for number, state in taken]

    def done(self, row: Row[State], state: State) -> None:
        """Note that a row is computed; ``state`` is handed out with what stands on it."""
        piece = row.piece
        segment = self._segments[piece.segment]
        if piece.end < segment.end:
            self._add(piece.segment, piece.end, state)
            return
        for child in segment.children:
            below = self._segments[child]
            if below.first < below.end:
                self._add(child, below.first, state)
