"""How the missing tokens of a batch go through the model: in depth-first sections of bounded length. No tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from promptdb.tree import Segment


@dataclass(frozen=True)
class Piece:
    """Tokens ``[start, end)`` of a segment."""

    segment: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        """Its length in tokens."""
        return self.end - self.start


@dataclass
class Section:
    """What goes through the model at once, and what it needs in the cache.

    Attributes
    ----------
    past : pieces whose keys and values come before, ancestors before descendants.
    new : pieces to compute, depth first.
    is_chain : each new piece stands on the one before it.
    """

    past: list[Piece] = field(default_factory=list)
    new: list[Piece] = field(default_factory=list)
    is_chain: bool = True

    @property
    def num_past(self) -> int:
        """Tokens in the cache before."""
        return sum(piece.num_tokens for piece in self.past)

    @property
    def num_new(self) -> int:
        """Tokens that go through the model."""
        return sum(piece.num_tokens for piece in self.new)


@dataclass(frozen=True)
class Limits:
    """Bounds of a section.

    Attributes
    ----------
    pass_tokens : most new tokens of several branches at once.
    chain_tokens : a run of at least so many tokens goes alone, which needs no mask.
    cache_tokens : most tokens, past and new, in the cache; a single path may be longer.
    max_path : prompts longer than this are run one branch at a time, or None.
    may_pack : whether several branches may go at once at all.
    """

    pass_tokens: int = 512
    chain_tokens: int = 192
    cache_tokens: int = 1 << 20
    max_path: int | None = None
    may_pack: bool = True


def sections(segments: Sequence[Segment], limits: Limits) -> Iterator[Section]:
    """Yield the sections of a tree, depth first.

    Every token that has to be computed is in exactly one. A section's past is stored, or stands in the section before
    it, new or past.
    """
    builder = _Builder(segments)
    for number, segment in enumerate(segments):
        start = segment.first
        while start < segment.end:
            is_long = segment.end - start >= limits.chain_tokens
            room = limits.pass_tokens - builder.num_new
            piece = Piece(number, start, segment.end if is_long else min(segment.end, start + max(1, room)))
            if builder.section.new and (is_long or not builder.fits(piece, limits)):
                yield builder.take()
                continue
            builder.add(piece)
            start = piece.end
            if is_long:
                yield builder.take()
    if builder.section.new:
        yield builder.take()


class _Builder:
    """Fills one section after another, and keeps track of what each has in its cache."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._begin()

    def _begin(self) -> None:
        self.section = Section()
        self._covered: dict[int, int] = {}  # by segment: its tokens up to here are in the cache
        self._past: dict[int, Piece] = {}
        self._num_tokens = self.num_new = self._longest = 0

    def take(self) -> Section:
        """Return the section and begin another."""
        section = self.section
        # Parents stand before their children in depth-first order.
        section.past = [self._past[number] for number in sorted(self._past)]
        self._begin()
        return section

    def _needed(self, piece: Piece) -> list[Piece]:
        """Return what has to come into the cache before a piece."""
        needed = []
        number, end = piece.segment, piece.start
        while number >= 0:
            segment = self._segments[number]
            start = self._covered.get(number, segment.start)
            if start < end:
                needed.append(Piece(number, start, end))
            if number in self._covered:
                break
            number, end = segment.parent, segment.start
        return needed

    def fits(self, piece: Piece, limits: Limits) -> bool:
        """Return whether a piece may join the section, which has some already."""
        longest = max(self._longest, piece.end)
        may_branch = limits.may_pack and (limits.max_path is None or longest <= limits.max_path)
        if not (may_branch or (self.section.is_chain and self._follows(piece))):
            return False
        tokens = self._num_tokens + piece.num_tokens + sum(each.num_tokens for each in self._needed(piece))
        return tokens <= limits.cache_tokens and self.num_new + piece.num_tokens <= limits.pass_tokens

    def _follows(self, piece: Piece) -> bool:
        """Return whether a piece stands on the last one of the section."""
        if not self.section.new:
            return True
        last = self.section.new[-1]
        if last.segment == piece.segment:
            return last.end == piece.start
        above = self._segments[piece.segment].parent
        # The first token of a segment; one further in has stored tokens before it.
        starts = piece.start == self._segments[piece.segment].start
        return above == last.segment and last.end == self._segments[above].end and starts

    def add(self, piece: Piece) -> None:
        """Put a piece into the section, with what it needs."""
        section = self.section
        section.is_chain = section.is_chain and self._follows(piece)
        for needed in self._needed(piece):
            before = self._past.get(needed.segment)
            start = before.start if before is not None else needed.start
            self._past[needed.segment] = Piece(needed.segment, start, needed.end)
            self._covered[needed.segment] = needed.end
            self._num_tokens += needed.num_tokens
        self._covered[piece.segment] = piece.end
        section.new.append(piece)
        self._num_tokens += piece.num_tokens
        self.num_new += piece.num_tokens
        self._longest = max(self._longest, piece.end)
