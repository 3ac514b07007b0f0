"""A corpus cut into shares, so that machines that compute them never compute the same token twice. No tensors.

Prompts that begin alike are a subtree of the corpus' tree, and go to one machine. A subtree that is too large for that
is opened: its first tokens, up to where its prompts part, are computed once before all else, and what stands on them
are subtrees of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from itertools import accumulate

from promptdb.errors import InputTypeError
from promptdb.keys import TOKEN_BYTES
from promptdb.tokens import Prompt
from promptdb.tree import Branch, Segment, build

# Machines differ, and so do tokens: with some shares for each, who is done sooner takes more of them.
_SHARES_A_WORKER = 4


@dataclass(frozen=True)
class Shares:
    """Who computes what of a corpus.

    Attributes
    ----------
    first : beginnings that several shares have in common, to be computed before any of those; parents before children.
    first_tokens : how many distinct tokens they have.
    shares : the numbers of the prompts of each share, prompts that begin alike beside each other. Every prompt is in
        one of them. The largest share comes first; workers take them in order.
    share_tokens : how many distinct tokens each share has beyond ``first``. No token is in two shares.
    bases : for each share, which of ``first`` its prompts go on from.
    """

    first: tuple[Prompt, ...]
    first_tokens: int
    shares: tuple[tuple[int, ...], ...]
    share_tokens: tuple[int, ...]
    bases: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Distinct tokens of the corpus: those of the same prompt, up to there, count once."""
        return self.first_tokens + sum(self.share_tokens)


def split(prompts: Sequence[Prompt], num_workers: int, *, shares_a_worker: int = _SHARES_A_WORKER) -> Shares:
    """Cut a corpus into shares of about as many distinct tokens.

    Parameters
    ----------
    prompts : the corpus; the same prompt may come several times.
    num_workers : how many machines compute at once.
    shares_a_worker : most shares for each of them.

    Raises
    ------
    InputTypeError
        A number is not positive.

    Notes
    -----
    What all wait for and what the busiest machine then has to do is together never more than one machine alone would
    have. Deterministic. Cost: sorting the prompts; memory: their tokens, and some 500 bytes for each place where they
    part.
    """
    for name, value in (("num_workers", num_workers), ("shares_a_worker", shares_a_worker)):
        if type(value) is not int or value < 1:
            raise InputTypeError(f"{name} is {value!r}", "give a positive number")
    branches = [Branch(prompt.packed, prompt.boundaries, 0, has_logits=False) for prompt in prompts]
    segments = build(branches, want_logits=True)
    corpus = _Corpus(segments)
    opened = sorted(corpus.open(num_workers))
    bins = _balanced([(corpus.weight(unit), unit) for unit in corpus.units(opened)], num_workers * shares_a_worker)
    # What ends where a subtree was opened is there when the shares begin: loading it is all that is left.
    ready = [(number, prompt) for number in opened for prompt in segments[number].ends]
    place = {number: at for at, number in enumerate(opened)}
    shares = []
    for at, (tokens, units) in enumerate(bins):
        done = ready[at :: len(bins)]
        numbers = [*(prompt for _, prompt in done), *(each for unit in sorted(units) for each in corpus.ends(unit))]
        stands_on = {number for number, _ in done} | {segments[unit].parent for unit in units} - {-1}
        shares.append((tokens, tuple(numbers), tuple(sorted(place[number] for number in stands_on))))
    shares.sort(key=lambda share: -share[0])
    return Shares(
        tuple(corpus.beginning(number, branches) for number in opened),
        sum(segments[number].end - segments[number].start for number in opened),
        tuple(numbers for _, numbers, _ in shares),
        tuple(tokens for tokens, _, _ in shares),
        tuple(bases for _, _, bases in shares),
    )


class _Corpus:
    """The tree of a corpus: segments depth first, so that a subtree is a range of them."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._before = [0, *accumulate(segment.end - segment.start for segment in segments)]
        self.num_tokens = self._before[-1]

    def weight(self, number: int) -> int:
        """Return how many tokens the subtree of a segment has."""
        return self._before[self._segments[number].last] - self._before[number]

    def ends(self, number: int) -> list[int]:
        """Return the prompts of the subtree of a segment."""
        return [prompt for segment in self._segments[number : self._segments[number].last] for prompt in segment.ends]

    def open(self, num_workers: int) -> set[int]:
        """Return the segments to compute before all else, each with those that it stands on.

        The largest subtree is opened again and again while it is more than a worker's part. Of all states on the way,
        the one counts in which computing takes least: first what all wait for, then the busiest worker's part.
        """
        segments = self._segments
        waiting = [(-self.weight(number), number) for number, each in enumerate(segments) if each.parent < 0]
        heapify(waiting)
        opened: list[int] = []
        first, num_best, least = 0, 0, self._takes(0, waiting, num_workers)
        while waiting:
            weight, number = -waiting[0][0], waiting[0][1]
            if not segments[number].children or weight * num_workers <= self.num_tokens - first:
                break
            heappop(waiting)
            opened.append(number)
            first += segments[number].end - segments[number].start
            for child in segments[number].children:
                heappush(waiting, (-self.weight(child), child))
            takes = self._takes(first, waiting, num_workers)
            if takes < least:
                num_best, least = len(opened), takes
        return set(opened[:num_best])

    def _takes(self, first: int, waiting: Sequence[tuple[int, int]], num_workers: int) -> int:
        largest = -waiting[0][0] if waiting else 0
        return first + max(largest, -(-(self.num_tokens - first) // num_workers))

    def units(self, opened: Collection[int]) -> list[int]:
        """Return the segments whose subtrees are computed whole: those that stand on nothing, or on what is opened."""
        known = set(opened)
        return [
            number
            for number, segment in enumerate(self._segments)
            if number not in known and (segment.parent < 0 or segment.parent in known)
        ]

    def beginning(self, number: int, branches: Sequence[Branch]) -> Prompt:
        """Return the tokens up to the end of a segment, with the boundaries of all prompts that have them."""
        segment = self._segments[number]
        packed = branches[segment.prompt].packed[: segment.end * TOKEN_BYTES]
        boundaries: set[int] = set()
        while number >= 0:
            boundaries |= self._segments[number].boundaries
            number = self._segments[number].parent
        return Prompt(packed, tuple(sorted(each for each in boundaries if each < segment.end)))


def _balanced(units: Sequence[tuple[int, int]], most: int) -> list[tuple[int, list[int]]]:
    """Put units of (tokens, number) into at most so many bins of (tokens, numbers), the largest unit first."""
    bins: list[tuple[int, int, list[int]]] = []
    for tokens, number in sorted(units, key=lambda unit: (-unit[0], unit[1])):
        if len(bins) < most:
            heappush(bins, (tokens, len(bins), [number]))
            continue
        lightest, at, numbers = bins[0]
        numbers.append(number)
        heapreplace(bins, (lightest + tokens, at, numbers))
    return [(tokens, numbers) for tokens, _, numbers in bins]
