"""The tree of a batch: which tokens its prompts share, which are stored, and which have to be computed. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from promptdb.keys import common_prefix, num_tokens


@dataclass(frozen=True)
class Branch:
    """A prompt of a batch, and what is stored of it.

    Attributes
    ----------
    packed : the prompt's n packed tokens.
    boundaries : positions at which its pieces end.
    stored : how many of its first tokens have stored keys and values.
    has_logits : whether the logits after those are stored too.
    """

    packed: bytes
    boundaries: tuple[int, ...]
    stored: int
    has_logits: bool


@dataclass
class Segment:
    """Tokens ``[start, end)`` that one or more prompts of a batch share, up to where they part or one of them ends.

    Attributes
    ----------
    prompt : a prompt that passes through, and of all that do one with most tokens stored.
    owner : the first prompt, in the order of the batch, that passes through.
    parent : number of the segment before this one, or -1.
    children : numbers of those after it.
    last : number after that of the last segment of the subtree.
    stored : tokens ``[start, stored)`` are stored.
    ends : the prompts that end at ``end``.
    boundaries : where pieces end inside.
    needs_again : the logits after ``stored`` are not stored but are needed: the token before it is computed again.
    """

    prompt: int
    owner: int
    start: int
    end: int
    parent: int = -1
    children: list[int] = field(default_factory=list)
    last: int = 0
    stored: int = 0
    ends: list[int] = field(default_factory=list)
    boundaries: set[int] = field(default_factory=set)
    needs_again: bool = False

    @property
    def first(self) -> int:
        """Where computing starts; ``end`` if nothing has to be."""
        return self.stored - 1 if self.needs_again else self.stored


@dataclass(eq=False)
class _Node:
    start: int
    end: int
    prompt: int
    parent: _Node | None
    children: list[_Node] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)


def build(branches: Sequence[Branch], *, want_logits: bool) -> list[Segment]:
    """Return the segments of a batch, depth first, parents before children.

    Parameters
    ----------
    branches : its prompts; the same one may come several times.
    want_logits : whether the logits after the last token of every prompt are needed.

    Notes
    -----
    Sorts the prompts by their bytes, which puts those with a common prefix beside each other.
    """
    roots = _trie(branches)
    segments: list[Segment] = []
    waiting = [(root, -1) for root in reversed(roots)]
    while waiting:
        node, parent = waiting.pop()
        number = len(segments)
        segments.append(Segment(node.prompt, node.prompt, node.start, node.end, parent, ends=node.ends))
        if parent >= 0:
            segments[parent].children.append(number)
        waiting += [(child, number) for child in reversed(node.children)]
    _summarise(segments, branches)
    _enter_boundaries(segments, branches)
    for segment in segments:
        segment.needs_again = _needs_again(segment, segments, branches, want_logits=want_logits)
    return segments


def _trie(branches: Sequence[Branch]) -> list[_Node]:
    roots: list[_Node] = []
    path: list[_Node] = []
    before = b""
    for prompt in sorted(range(len(branches)), key=lambda at: branches[at].packed):
        packed = branches[prompt].packed
        shared, total = common_prefix(before, packed), num_tokens(packed)
        before = packed
        while path and path[-1].start >= shared:
            path.pop()
        if path and path[-1].end > shared:
            path.append(_split(path.pop(), shared, roots))
        if shared < total:
            parent = path[-1] if path else None
            node = _Node(shared, total, prompt, parent)
            (parent.children if parent else roots).append(node)
            path.append(node)
        path[-1].ends.append(prompt)
    return roots


def _split(node: _Node, position: int, roots: list[_Node]) -> _Node:
    """Give a node's first tokens a node of their own, which is returned."""
    upper = _Node(node.start, position, node.prompt, node.parent, [node])
    siblings = node.parent.children if node.parent else roots
    siblings[-1] = upper  # in the order of their bytes, it is the last that is split
    node.start, node.parent = position, upper
    return upper


def _summarise(segments: list[Segment], branches: Sequence[Branch]) -> None:
    """Tell each segment what its whole subtree knows: the first prompt, the one with most stored, the last segment."""
    for number in range(len(segments) - 1, -1, -1):
        segment = segments[number]
        segment.last = max(segment.last, number + 1)
        through = [segment.prompt, *segment.ends]
        segment.prompt = max(through, key=lambda at: branches[at].stored)
        segment.owner = min(segment.owner, *through)
        segment.stored = min(max(branches[segment.prompt].stored, segment.start), segment.end)
        if segment.parent >= 0:
            above = segments[segment.parent]
            above.last = max(above.last, segment.last)
            above.owner = min(above.owner, segment.owner)
            above.prompt = max(above.prompt, segment.prompt, key=lambda at: branches[at].stored)


def _enter_boundaries(segments: list[Segment], branches: Sequence[Branch]) -> None:
    for number, segment in enumerate(segments):
        for prompt in segment.ends:
            at = number
            for boundary in sorted(branches[prompt].boundaries, reverse=True):
                while at >= 0 and segments[at].start >= boundary:
                    at = segments[at].parent
                if at < 0:
                    break
                segments[at].boundaries.add(boundary)


def _needs_again(segment: Segment, segments: list[Segment], branches: Sequence[Branch], *, want_logits: bool) -> bool:
    """Return whether the logits after a segment's last stored token are needed, and not stored."""
    if segment.stored == segment.start:
        return False  # what comes before is another segment's, or nothing
    if segment.stored < segment.end:
        needed = [segment.prompt]
    else:
        attached = [segments[at].prompt for at in segment.children if segments[at].stored == segments[at].start]
        needed = [*attached, *(segment.ends if want_logits else ())]
    return any(not branches[prompt].has_logits or branches[prompt].stored != segment.stored for prompt in needed)
