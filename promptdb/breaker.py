"""When to leave a far side alone: after failures for a while, longer each time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from promptdb.events import note, warn

_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0


class Breaker:
    """Says whether to ask a far side that may have failed. Thread safe.

    After a failure nobody asks for a while: a second, then twice as long each time, up to a minute, each stretched or
    shortened by up to a half at random, so that many clients do not come back together. Then one caller tries; the
    others wait for what becomes of it. The first failure of a row is logged, and so is the end of it.

    Parameters
    ----------
    what : the far side and what is asked of it, for the log.
    is_loud : warn of failures; where they are raised, they need not be.
    clock : seconds, for tests.

    Attributes
    ----------
    num_failures : in all.
    last_failure : message of the last one; empty if there was none since it last worked.
    latest : when the last one was, by the clock, and its message.
    """

    def __init__(self, what: str, *, is_loud: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._say = warn if is_loud else note
        self._clock = clock
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._next_try = 0.0
        self._is_trying = False
        self.num_failures = 0
        self.last_failure = ""
        self.latest: tuple[float, str] = (float("-inf"), "")

    def allows(self) -> bool:
        """Return whether to ask now. Who is allowed to must tell how it went."""
        with self._lock:
            if not self._in_a_row:
                return True
            if self._is_trying or self._clock() < self._next_try:
                return False
            self._is_trying = True
            return True

    def wait_s(self) -> float:
        """Return how long it will be until somebody may ask."""
        with self._lock:
            return max(0.0, self._next_try - self._clock()) if self._in_a_row else 0.0

    def succeeded(self) -> None:
        """Note that the far side answered."""
        with self._lock:
            was_failing, self._in_a_row, self._is_trying, self.last_failure = self._in_a_row, 0, False, ""
        if was_failing:
            self._say("shared_works", f"{self._what} works again", what=self._what)

    def failed(self, reason: str) -> None:
        """Note that it did not."""
        with self._lock:
            # Those who were under way when the first one failed say nothing new.
            is_news = self._is_trying or not self._in_a_row
            is_first = not self._in_a_row
            self.num_failures += 1
            self.last_failure = reason
            self.latest = self._clock(), reason
            self._is_trying = False
            if is_news:
                wait_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**self._in_a_row)
                self._in_a_row = min(self._in_a_row + 1, 16)
                self._next_try = self._clock() + wait_s * random.uniform(0.5, 1.5)
        if is_first:
            message = f"{self._what} failed, and is left alone for a while: {reason}"
            self._say("shared_failed", message, what=self._what, reason=reason)
