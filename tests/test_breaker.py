"""When a far side is left alone, and who tries it again."""

import logging

from promptdb.breaker import Breaker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_waits_grow_and_one_caller_tries(caplog):
    clock = Clock()
    breaker = Breaker("reading from somewhere", clock=clock)
    assert breaker.allows()
    assert breaker.wait_s() == 0
    longest = 0.0
    with caplog.at_level(logging.WARNING, "promptdb"):
        for number in range(12):
            breaker.failed("no route")
            wait_s = breaker.wait_s()
            assert 0.5 * min(60, 2**number) <= wait_s <= 1.5 * min(60, 2**number)
            longest = max(longest, wait_s)
            assert not breaker.allows()
            clock.now += wait_s
            assert breaker.allows()
            assert not breaker.allows()  # somebody is trying
        assert longest <= 90
        breaker.succeeded()
    assert breaker.allows()
    assert breaker.allows()
    assert (breaker.num_failures, breaker.last_failure) == (12, "")
    assert [record.message for record in caplog.records] == [
        "reading from somewhere failed, and is left alone for a while: no route",
        "reading from somewhere works again",
    ]


def test_failures_of_one_moment_count_once():
    """Ten calls that were under way when the far side went are one failure, not ten."""
    clock = Clock()
    breaker = Breaker("x", clock=clock)
    for _ in range(10):
        breaker.failed("gone")
    assert breaker.wait_s() <= 1.5
    assert breaker.num_failures == 10
