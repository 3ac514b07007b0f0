"""The tree of a batch and its sections, against an oracle that looks at every token of every prompt."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from promptdb.keys import pack_tokens, unpack_tokens
from promptdb.plan import Limits, sections
from promptdb.tree import Branch, build

PROMPT = st.lists(st.integers(1, 3), min_size=1, max_size=14)


@st.composite
def batches(draw):
    """Draw prompts, and a set of stored prompts whose prefixes, all of them, are stored."""
    prompts = draw(st.lists(PROMPT, min_size=1, max_size=10))
    stored = {tuple(p[:n]) for p in draw(st.lists(PROMPT, max_size=4)) for n in range(1, len(p) + 1)}
    with_logits = {prefix for prefix in stored if draw(st.booleans())}
    branches = []
    for prompt in prompts:
        depth = max((n for n in range(len(prompt) + 1) if n == 0 or tuple(prompt[:n]) in stored), default=0)
        boundaries = tuple(sorted(draw(st.sets(st.integers(1, len(prompt)), max_size=3)) - {len(prompt)}))
        branches.append(Branch(pack_tokens(prompt), boundaries, depth, tuple(prompt[:depth]) in with_logits))
    return prompts, stored, with_logits, branches


def tokens_of(segments, branches, number, start, end):
    """Return the prefixes that a piece of a segment stands for: one for each of its tokens."""
    prompt = list(unpack_tokens(branches[segments[number].prompt].packed))
    return [tuple(prompt[: at + 1]) for at in range(start, end)]


@settings(max_examples=150, deadline=None)
@given(batches(), st.booleans())
def test_segments_are_the_distinct_prefixes(batch, want_logits):
    prompts, stored, _, branches = batch
    segments = build(branches, want_logits=want_logits)
    distinct = {tuple(prompt[:n]) for prompt in prompts for n in range(1, len(prompt) + 1)}
    found = [
        each
        for number, segment in enumerate(segments)
        for each in tokens_of(segments, branches, number, segment.start, segment.end)
    ]
    assert sorted(found) == sorted(distinct)
    for number, segment in enumerate(segments):
        assert segment.start < segment.end
        assert segment.parent < number < segment.last
        assert number in segments[segment.parent].children or segment.parent == -1
        path = tuple(unpack_tokens(branches[segment.prompt].packed))[: segment.end]
        through = [at for at, prompt in enumerate(prompts) if tuple(prompt[: segment.end]) == path]
        assert segment.owner == min(through)
        assert set(segment.ends) == {at for at in through if len(prompts[at]) == segment.end}
        assert segment.stored == max(
            [segment.start, *(n for n in range(segment.start, segment.end + 1) if path[:n] in stored)]
        )
        inner = {b for at in through for b in branches[at].boundaries if segment.start < b <= segment.end}
        assert segment.boundaries == inner
        ends = {at for at, other in enumerate(segments) if number < at < segment.last}
        below = {
            at
            for at, other in enumerate(segments)
            if at != number
            and tuple(unpack_tokens(branches[other.prompt].packed))[: segment.end] == path
            and other.start >= segment.end
        }
        assert ends == below


def wanted_tokens(prompts, stored, with_logits, *, want_logits):
    """Return the prefixes whose last token has to go through the model."""
    wanted = set()
    for prompt in prompts:
        depth = max(n for n in range(len(prompt) + 1) if n == 0 or tuple(prompt[:n]) in stored)
        wanted |= {tuple(prompt[:n]) for n in range(depth + 1, len(prompt) + 1)}
        needs_logits = depth < len(prompt) or want_logits
        if depth and needs_logits and tuple(prompt[:depth]) not in with_logits:
            wanted.add(tuple(prompt[:depth]))
    return wanted


@settings(max_examples=250, deadline=None)
@given(
    batches(),
    st.booleans(),
    st.builds(
        Limits,
        pass_tokens=st.integers(1, 12),
        chain_tokens=st.integers(1, 12),
        cache_tokens=st.integers(1, 40),
        max_path=st.none() | st.integers(1, 12),
        may_pack=st.booleans(),
    ),
)
def test_sections_compute_what_is_wanted_once_and_find_what_they_need(batch, want_logits, limits):
    prompts, stored, with_logits, branches = batch
    segments = build(branches, want_logits=want_logits)
    computed, before = [], set()
    for section in sections(segments, limits):
        new = [
            prefix
            for piece in section.new
            for prefix in tokens_of(segments, branches, piece.segment, piece.start, piece.end)
        ]
        past = [
            prefix
            for piece in section.past
            for prefix in tokens_of(segments, branches, piece.segment, piece.start, piece.end)
        ]
        assert len(set(new) | set(past)) == len(new) + len(past), "every token is in the cache once"
        # All ancestors of what is computed are there, and come from the store or from the section before.
        for prefix in new:
            assert {prefix[:n] for n in range(1, len(prefix))} <= set(new) | set(past)
        assert set(past) <= stored | before
        for at, prefix in enumerate(new):
            assert {prefix[:n] for n in range(1, len(prefix))} <= set(past) | set(new[:at]), "parents come first"
        chain = all(after[:-1] == this for this, after in pairwise(new))
        assert section.is_chain == chain
        assert limits.may_pack or chain
        if not chain:
            assert len(new) <= limits.pass_tokens
            assert len(new) + len(past) <= limits.cache_tokens
            assert limits.max_path is None or max(map(len, new)) <= limits.max_path
        before = set(past) | set(new)
        computed += new
    assert len(computed) == len(set(computed))
    assert set(computed) == wanted_tokens(prompts, stored, with_logits, want_logits=want_logits)
