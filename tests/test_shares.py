"""How a corpus is cut into shares: no token twice, nothing left out, and nobody with much more than the others."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptdb.errors import InputTypeError
from promptdb.keys import pack_tokens, unpack_tokens
from promptdb.shares import split
from promptdb.tokens import Prompt


def prefixes(prompts):
    """Return the distinct tokens of prompts: each is a token and all that stands before it."""
    return {tuple(tokens[: end + 1]) for tokens in prompts for end in range(len(tokens))}


def asked(prompts):
    return [Prompt(pack_tokens(tokens)) for tokens in prompts]


def check(prompts, num_workers, **options):
    """Check what must hold for any corpus, with sets of prefixes; return the shares."""
    shares = split(asked(prompts), num_workers, **options)
    assert sorted(number for share in shares.shares for number in share) == list(range(len(prompts)))
    first = prefixes(unpack_tokens(each.packed) for each in shares.first)
    own = [prefixes(prompts[number] for number in share) - first for share in shares.shares]
    assert shares.first_tokens == len(first)
    assert list(shares.share_tokens) == [len(each) for each in own]
    assert sum(map(len, own)) == len(set().union(*own)), "a token in two shares"
    assert shares.num_tokens == len(prefixes(prompts))
    assert list(shares.share_tokens) == sorted(shares.share_tokens, reverse=True)
    for share, bases in zip(shares.shares, shares.bases, strict=True):
        here = [tuple(unpack_tokens(shares.first[base].packed)) for base in bases]
        for number in share:
            common = prefixes([prompts[number]]) & first
            assert not common or max(common, key=len) in here
    # Whoever computes the beginnings in order always goes on from what is there.
    for at, prompt in enumerate(shares.first):
        before = prefixes(unpack_tokens(each.packed) for each in shares.first[:at])
        assert prefixes([unpack_tokens(prompt.packed)]) - before
    # Handed out in order, to whoever is free, it takes no longer than one machine alone.
    busy = [0] * num_workers
    for tokens in shares.share_tokens:
        busy[busy.index(min(busy))] += tokens
    assert shares.first_tokens + max(busy) <= max(shares.num_tokens, 0)
    return shares, shares.first_tokens + max(busy)


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(st.lists(tokens, max_size=25), st.integers(1, 4), st.integers(1, 4))
def test_any_corpus(prompts, num_workers, shares_a_worker):
    check(prompts, num_workers, shares_a_worker=shares_a_worker)


def test_nothing_in_common():
    prompts = [[number] * 100 for number in range(8)]
    shares, takes = check(prompts, 4)
    assert shares.first == ()
    assert takes == 200


def test_groups_stay_together():
    """Prompts that share much go to one worker, as nobody has to wait then."""
    prompts = [[group, *range(10, 200), tail] for group in range(4) for tail in range(5)]
    shares, takes = check(prompts, 2)
    assert shares.first == ()
    assert {frozenset(number // 5 for number in share) for share in shares.shares} == {
        frozenset([group]) for group in range(4)
    }
    assert takes == 2 * 196


def test_what_all_share_is_computed_first():
    """Few-shot prompts: a long beginning, and a question each."""
    beginning = list(range(1000, 1500))
    prompts = [[*beginning, number, *range(99)] for number in range(20)]
    shares, takes = check(prompts, 4)
    assert [unpack_tokens(each.packed).tolist() for each in shares.first] == [beginning]
    assert takes == 500 + 20 * 100 // 4


def test_beginnings_in_beginnings():
    """All share a system prompt; one of two few-shot blocks is most of the corpus."""
    system, long, short = list(range(100)), list(range(200, 600)), list(range(700, 720))
    prompts = [[*system, *long, number, *range(50)] for number in range(30)]
    prompts += [[*system, *short, number, 1, 2] for number in range(3)]
    shares, takes = check(prompts, 3)
    assert [unpack_tokens(each.packed).tolist() for each in shares.first] == [system, system + long]
    assert takes < 0.6 * shares.num_tokens


def test_opening_must_pay():
    """A chain of prompts that go on from each other cannot be shared out; one that only parts at its end hardly can."""
    chain = [list(range(length)) for length in range(1, 100)]
    shares, takes = check(chain, 4)
    assert (shares.first, takes) == ((), 99)
    assert len(shares.shares) == 1


def test_prompts_that_end_in_a_beginning():
    beginning = list(range(100))
    prompts = [beginning, beginning[:50], *([*beginning, number, *range(60)] for number in range(4)), beginning]
    shares, _ = check(prompts, 4)
    assert [len(each.packed) // 4 for each in shares.first] == [50, 100]


def test_boundaries_of_beginnings():
    """The ends of pieces of every prompt count, as far as they lie inside."""
    beginning = list(range(100))
    prompts = [Prompt(pack_tokens([*beginning, number, *range(60)]), (10 + number, 100, 130)) for number in range(4)]
    shares = split(prompts, 4)
    assert [each.boundaries for each in shares.first] == [(10, 11, 12, 13)]


def test_few_large_shares_or_many_small_ones():
    prompts = [[number, *range(20)] for number in range(1000)]
    assert len(check(prompts, 3)[0].shares) == 12
    assert len(check(prompts, 3, shares_a_worker=1)[0].shares) == 3
    shares, _ = check(prompts, 1)
    assert sum(shares.share_tokens) == 21_000


def test_empty_and_wrong():
    assert split([], 3).shares == ()
    assert check([[1, 2, 3]], 5)[0].shares == ((0,),)
    assert check([[1, 2, 3]] * 4, 2)[0].share_tokens == (3,)
    for wrong in (0, -1, 1.0, True, "2"):
        with pytest.raises(InputTypeError, match="num_workers"):
            split([], wrong)
