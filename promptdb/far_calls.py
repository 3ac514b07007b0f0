"""Calls to a far store that end in time, and are not made while it fails."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import TypeVar

from promptdb.breaker import Breaker
from promptdb.errors import SharedError
from promptdb.far import FarStore, Pieces
from promptdb.shared_counts import Counts
from promptdb.shared_options import SharedOptions

Result = TypeVar("Result")

_WEIGHT = 0.3
_MOST_BYTES_AHEAD = 256 << 20
# A pass of less than this says more about the round trip than about the link.
_FEWEST_BYTES = 1 << 20


class FarCalls:
    """A far store behind deadlines and breakers, one for reading and one for writing. Thread safe.

    Attributes
    ----------
    counts : what this process has done.
    round_trip_s, bytes_per_s : moving averages of what was measured; None before.
    """

    def __init__(self, far: FarStore, options: SharedOptions) -> None:
        self.far = far
        self.options = options
        is_loud = not options.required
        self.reading = Breaker(f"reading from the shared store {far.name}", is_loud=is_loud)
        self.writing = Breaker(f"writing to the shared store {far.name}", is_loud=is_loud)
        self.counts = Counts()
        self.round_trip_s: float | None = None
        self.bytes_per_s: float | None = None
        # An operation is up to two round trips on a new connection.
        self.wait_s = options.connect_timeout_s + 2 * options.timeout_s + 0.5
        self._pool = ThreadPoolExecutor(options.concurrency + 2, "promptdb-shared")
        self._lock = threading.Lock()

    @property
    def failure(self) -> str:
        """What the far side failed with last; empty if it works, as far as is known."""
        return self.writing.last_failure or self.reading.last_failure

    @property
    def num_failures(self) -> int:
        """How often the far side has failed this process."""
        return self.reading.num_failures + self.writing.num_failures

    @property
    def latest_failure(self) -> str:
        """What it failed with last, though it may have worked since; empty if it never failed."""
        return max(self.reading.latest, self.writing.latest)[1]

    def pause_s(self) -> float:
        """Return how long it will be until sending may be tried: that asks what is there first."""
        return max(self.reading.wait_s(), self.writing.wait_s())

    def read(self, work: Callable[[FarStore], Result], *, wait_s: float | None = None) -> Result:
        """Ask the far side something, within ``wait_s``; raise :class:`SharedError` if it does not answer."""
        return self._ask(self.reading, work, wait_s or self.wait_s)

    def lookup(self, keys: Sequence[str]) -> list[Pieces | None]:
        """Return small values, and note how long the round trip took."""
        began = monotonic()
        found = self.read(lambda far: far.get(keys))
        with self._lock:
            self.counts.round_trips += 1
            self.round_trip_s = _folded(self.round_trip_s, monotonic() - began)
        return found

    def touch(self, work: Callable[[FarStore], object]) -> None:
        """Ask something in the background that nobody waits for, if the far side works. A failure means nothing."""
        if not self.pause_s():
            with suppress(SharedError):
                self._submit(work)

    def lease(self, keys: Sequence[str], holder: str, ttl_s: float) -> list[float]:
        """Take leases; see :meth:`promptdb.far.FarStore.lease`. To the far side that is writing, and callers wait."""
        return self._ask(self.writing, lambda far: far.lease(keys, holder, ttl_s), self.wait_s)

    def write(self, work: Callable[[FarStore], Result]) -> Result:
        """Send something; the engine's own timeouts bound each part of it, and nobody waits for it but the sender."""
        return self._ask(self.writing, work, self.options.deadline_s + self.wait_s)

    def _ask(self, breaker: Breaker, work: Callable[[FarStore], Result], wait_s: float) -> Result:
        self._check(breaker)
        return self._result(breaker, self._submit(work), wait_s)

    def _check(self, breaker: Breaker) -> None:
        if not breaker.allows():
            raise SharedError(
                f"the shared store {self.far.name} is left alone for a while: {breaker.last_failure}",
                "`promptdb shared status` tells more",
            )

    def _submit(self, work: Callable[[FarStore], Result]) -> Future[Result]:
        try:
            return self._pool.submit(work, self.far)
        except RuntimeError as error:  # the pool is shut down
            raise SharedError("the shared store is closed", "open the store again") from error

    def _result(self, breaker: Breaker, future: Future[Result], wait_s: float) -> Result:
        result = self._wait(breaker, future, wait_s)
        breaker.succeeded()
        return result

    def _wait(self, breaker: Breaker, future: Future[Result], wait_s: float) -> Result:
        try:
            return future.result(max(0.0, wait_s))
        except FutureTimeoutError:
            future.cancel()
            error = SharedError(f"{self.far.name}: no answer within {wait_s:.1f} s", "check the network")
            breaker.failed(str(error))
            raise error from None
        except CancelledError as error:
            raise SharedError("the shared store is closed", "open the store again") from error
        except SharedError as error:
            breaker.failed(str(error))
            raise
        except BaseException as error:
            breaker.failed(repr(error))
            raise

    def fetch(self, wanted: Sequence[tuple[str, int]], deadline_s: float | None = None) -> Generator[Pieces | None]:
        """Yield values in order, fetched in parallel ahead of whoever takes them, within the deadline of the options.

        Parameters
        ----------
        wanted : (key, size in bytes) of each.
        """
        if not wanted:
            return
        self._check(self.reading)
        ends = monotonic() + (deadline_s or self.options.deadline_s)
        futures: deque[Future[list[Pieces | None]]] = deque()
        ahead = iter(wanted)
        upcoming = next(ahead, None)
        ahead_bytes = 0
        try:
            for _, size in wanted:
                while upcoming is not None and (
                    not futures
                    or (len(futures) < self.options.concurrency and ahead_bytes + upcoming[1] <= _MOST_BYTES_AHEAD)
                ):
                    futures.append(self._submit(partial(_get_one, *upcoming)))
                    ahead_bytes += upcoming[1]
                    upcoming = next(ahead, None)
                (found,) = self._result(self.reading, futures[0], ends - monotonic())
                futures.popleft()
                ahead_bytes -= size
                yield found
        finally:
            for future in futures:
                future.cancel()

    def fetched(self, size_bytes: int, seconds: float) -> None:
        """Note how long it took until values were here, checked and stored."""
        if size_bytes >= _FEWEST_BYTES:
            with self._lock:
                self.bytes_per_s = _folded(self.bytes_per_s, size_bytes / max(seconds, 1e-6))

    def many(self, works: Sequence[Callable[[FarStore], Result]]) -> list[Result]:
        """Send several things in parallel; return what became of each. The first failure is raised."""
        self._check(self.writing)
        futures = [self._submit(work) for work in works]
        ends = monotonic() + self.options.deadline_s + self.wait_s
        try:
            results = [self._wait(self.writing, future, ends - monotonic()) for future in futures]
        finally:
            for future in futures:
                future.cancel()
        self.writing.succeeded()
        return results

    def close(self) -> None:
        """Give up what is under way, and release connections."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.far.close()


def _get_one(key: str, size: int, far: FarStore) -> list[Pieces | None]:
    return far.get([key], [size])


def _folded(before: float | None, now: float) -> float:
    return now if before is None else (1 - _WEIGHT) * before + _WEIGHT * now
