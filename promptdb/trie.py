"""The token trie: which stored spans cover a prompt, and how new ones attach. No tensors.

A node is an edge from ``d(start)`` to ``d(end)``. The walk follows, from each position that it has reached, the one
child that starts with the query's next token; an edge may be left in its middle, because the keys and values of its
first tokens do not depend on the rest, and because new spans attach to any position, not only to ends.

Invariant, kept by :func:`attach` under the write transaction: of the edges that can be reached, no two carry the same
token of the same prefix. The walk is then deterministic and finds the longest stored prefix, to the token. Where a span
was removed alone and others took its place with other cuts, what stood on it may overlap them: the walk then stops at
one of the ends, and what it found is right, if not the most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from blake3 import blake3

from promptdb.errors import CorruptDataError
from promptdb.format import CHILDREN
from promptdb.keys import DIGEST_BYTES, TOKEN_BYTES, PrefixHasher, child_key, common_prefix, num_tokens
from promptdb.tables import Reader, Writer

_REPAIR = "`promptdb verify --fix` makes the index again"


class Step(NamedTuple):
    """Use of the first ``num_tokens`` tokens of a stored span, which covers prompt positions ``[start, end)``."""

    node: bytes
    start: int
    num_tokens: int
    span_tokens: int  # length of the whole stored span, >= num_tokens

    @property
    def end(self) -> int:
        """Position after the last token used."""
        return self.start + self.num_tokens


_step = tuple.__new__  # what Step() does, less a call in Python: lookups make one for every span


class Walk(NamedTuple):
    """The longest stored prefix of a prompt: steps that tile ``[start, num_tokens)``, and ``d(num_tokens)``."""

    steps: tuple[Step, ...]
    num_tokens: int
    end_digest: bytes


def _read_child(value: memoryview) -> tuple[bytes, bytes]:
    if len(value) <= DIGEST_BYTES or len(value) % TOKEN_BYTES:
        raise CorruptDataError(f"an entry of {len(value)} bytes in the child index", _REPAIR)
    return value[:DIGEST_BYTES].tobytes(), value[DIGEST_BYTES:].tobytes()


# Spans that the child index named, by their key in it: (node, packed tokens), found to belong together.
KnownSpans = dict[bytes, tuple[bytes, bytes]]


def match(reader: Reader, root_digest: bytes, packed: bytes, start: int = 0, known: KnownSpans | None = None) -> Walk:
    """Find the longest stored prefix of a prompt, given that ``[0, start)`` is covered. Never writes.

    Parameters
    ----------
    reader : a snapshot of the store.
    root_digest : identity that the representations must have been computed with, 32 bytes.
    packed : the prompt's n packed tokens.
    start : where to begin; the steps then tile ``[start, num_tokens)``.
    known : what other prompts have met in the same snapshot; filled.

    Returns
    -------
    Walk
        ``num_tokens`` in [start, n]; the tokens of every step were compared with the prompt's, and its node ID is that
        of its span after this prefix.

    Raises
    ------
    CorruptDataError
        An entry of the child index cannot be.

    Notes
    -----
    One digest and one index read per step, whatever the size of the store and the number of children.
    """
    # Neither through PrefixHasher nor through functions: calls would take a sixth of the whole.
    hasher, get = blake3(packed[: start * TOKEN_BYTES], key=root_digest), reader.get
    digest = hasher.digest()
    steps: list[Step] = []
    at, end = start * TOKEN_BYTES, len(packed)
    while at < end:
        first = packed[at : at + TOKEN_BYTES]
        key = digest + first[::-1]  # child_key(digest, first)
        found = None if known is None else known.get(key)
        if found is None:
            value = get(CHILDREN, key)
            if value is None:
                break
            node, span = found = _read_child(value)
            if not span.startswith(first) or node != blake3(span, key=digest).digest():
                position = at // TOKEN_BYTES
                raise CorruptDataError(f"the child index has another span's entry at token {position}", _REPAIR)
            if known is not None:
                known[key] = found
        else:
            node, span = found
        if packed.startswith(span, at):
            shared = len(span)
            hasher.update(span)
        else:
            shared = common_prefix(span, packed[at : at + len(span)]) * TOKEN_BYTES
            hasher.update(span[:shared])
        steps.append(_step(Step, (node, at // TOKEN_BYTES, shared // TOKEN_BYTES, len(span) // TOKEN_BYTES)))
        at += shared
        digest = hasher.digest()
    return Walk(tuple(steps), at // TOKEN_BYTES, digest)


def cut(start: int, end: int, boundaries: Sequence[int], chunk_tokens: int) -> list[tuple[int, int]]:
    """Cut ``[start, end)`` into spans: at the boundaries of pieces and at multiples of ``chunk_tokens``.

    Returns
    -------
    list of (start, end)
        Tile ``[start, end)`` in order; none is empty or longer than ``chunk_tokens``.
    """
    if start >= end:
        return []
    first_multiple = (start // chunk_tokens + 1) * chunk_tokens
    cuts = {start, end, *range(first_multiple, end, chunk_tokens)}
    cuts.update(boundary for boundary in boundaries if start < boundary < end)
    ordered = sorted(cuts)
    return list(pairwise(ordered))


def attach(writer: Writer, child_hash: bytes, span: bytes, node: bytes) -> None:
    """Enter a span into the child index. The caller has seen, in this transaction, that nothing covers its tokens."""
    writer.put(CHILDREN, child_key(child_hash, span), node + span)


def detach(writer: Writer, child_hash: bytes, span: bytes) -> bool:
    """Take a span out of the child index; return whether it was there."""
    return writer.delete(CHILDREN, child_key(child_hash, span))


def children(reader: Reader, child_hash: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (node ID, packed tokens) of every span conditioned on ``child_hash``, in the order of their tokens."""
    for _, value in reader.scan(CHILDREN, prefix=child_hash):
        yield _read_child(value)


def descendants(
    reader: Reader, root_digest: bytes, prefix: bytes, span_start: int
) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield (start, node ID, packed tokens of prefix and span) of all that stands on a span, parents before children.

    Parameters
    ----------
    prefix : packed tokens from position 0 to the end of the span.
    span_start : position of the span's first token. Spans attached at any later position of it, its end included, and
        what stands on those in turn, are yielded; the span itself is not. With -1 and an empty
        prefix: all that can be reached from the root.

    Notes
    -----
    One digest and one index read per position: about 3 microseconds a token.
    """
    waiting = [(prefix, span_start)]
    while waiting:
        tokens, start = waiting.pop()
        hasher = PrefixHasher(root_digest, tokens)
        for position in range(start + 1, num_tokens(tokens) + 1):
            for node, span in children(reader, hasher.at(position)):
                longer = tokens[: position * TOKEN_BYTES] + span
                waiting.append((longer, position))
                yield position, node, longer
