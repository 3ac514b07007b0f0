"""Write-behind: commits run in a thread of their own, in order, and a failure is reported, never swallowed."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

from promptdb.allocator import KEPT_BYTES
from promptdb.commits import PutRequest
from promptdb.errors import PromptDBError, WriteBehindError
from promptdb.keys import Root, common_prefix

# As many small ones: a thousand share a wait for the disk well enough.
_MAX_GROUP_JOBS = 1024


class _Job(NamedTuple):
    request: PutRequest
    size_bytes: int


class WriteBehind:
    """A queue of puts and the thread that commits them: what is queued at that moment shares a transaction.

    Parameters
    ----------
    commit : stores requests, all together or not at all, durably: :meth:`promptdb.PromptDB.put_many`.
    max_pending_bytes : a submission waits while more than this is queued, so that a fast producer cannot fill memory.
    max_group_bytes : most bytes in one transaction; a larger request gets one of its own. Other processes wait while it
        is written, and more bytes make nothing faster; beyond what the allocator keeps, they make it slower.

    Notes
    -----
    Thread safe. The thread starts with the first job and is a daemon: a process that ends without :meth:`flush` or
    :meth:`close` loses what was queued, never half of a job. Where a transaction of several fails, each is tried by
    itself, so that none fails for another.
    """

    def __init__(
        self,
        commit: Callable[[Sequence[PutRequest]], object],
        *,
        max_pending_bytes: int = 1 << 30,
        max_group_bytes: int = KEPT_BYTES * 3 // 4,
    ) -> None:
        self.max_pending_bytes = max_pending_bytes
        self.max_group_bytes = max_group_bytes
        self._commit = commit
        self._jobs: deque[_Job] = deque()
        self._pending_bytes = 0
        self.num_done = 0  # commits that have left the queue: what was looked up before one may lack it
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failures: list[Exception] = []
        self._stopping = False
        self._pid = os.getpid()

    def _in_this_process(self) -> threading.Condition:
        """Return the condition. In a forked child there is no thread, and what was queued is its parent's to write."""
        if self._pid != os.getpid():
            self._jobs, self._pending_bytes, self._failures = deque(), 0, []
            self._condition, self._thread, self._pid = threading.Condition(), None, os.getpid()
        return self._condition

    def submit(self, request: PutRequest, size_bytes: int) -> None:
        """Queue a put; raise what an earlier one failed with.

        Parameters
        ----------
        size_bytes : what the request holds in memory.

        Raises
        ------
        WriteBehindError
            An earlier put failed, or the queue is closed. This one is not queued.
        """
        with self._in_this_process():
            while self._jobs and self._pending_bytes + size_bytes > self.max_pending_bytes:
                self._condition.wait()
            self._raise_failures()
            if self._stopping:
                raise WriteBehindError("the engine is closed", "create another one")
            self._jobs.append(_Job(request, size_bytes))
            self._pending_bytes += size_bytes
            if self._thread is None:
                self._thread = threading.Thread(target=_run, args=(weakref.ref(self),), daemon=True)
                self._thread.name = "promptdb-writer"
                self._thread.start()
            self._condition.notify_all()

    def wait_for(self, root: Root, packed: bytes, stored_tokens: int, *, has_logits: bool) -> bool:
        """Wait for queued commits that hold more of a prompt than its first ``stored_tokens`` tokens.

        Parameters
        ----------
        has_logits : whether the logits after those tokens are stored; if not, a commit that brings them is waited for.

        Returns
        -------
        bool
            Whether there were any: look up again.
        """

        def has_more(job: _Job) -> bool:
            request = job.request
            if request.root != root:
                return False
            shared = common_prefix(request.packed, packed)
            brings_logits = not has_logits and shared == stored_tokens and stored_tokens in request.logits
            return shared > stored_tokens or brings_logits

        with self._in_this_process():
            waited = False
            while any(map(has_more, self._jobs)):
                waited = True
                self._condition.wait()
            return waited

    def flush(self) -> None:
        """Wait until everything queued is durable.

        Raises
        ------
        WriteBehindError
            A commit failed since the last report; the cause is attached.
        """
        with self._in_this_process():
            while self._jobs:
                self._condition.wait()
            self._raise_failures()

    def close(self) -> None:
        """Flush, then stop the thread. Raises like :meth:`flush`."""
        try:
            self.flush()
        finally:
            with self._in_this_process():
                self._stopping = True
                self._condition.notify_all()
                thread = self._thread
            if thread is not None:
                thread.join()

    def raise_failures(self) -> None:
        """Raise what a commit failed with since the last report."""
        with self._in_this_process():
            self._raise_failures()

    def _raise_failures(self) -> None:
        if not self._failures:
            return
        failures, self._failures = self._failures, []
        first = failures[0]
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        hint = first.hint if isinstance(first, PromptDBError) else ""
        message = first.message if isinstance(first, PromptDBError) else repr(first)
        raise WriteBehindError(f"a background write failed{more}: {message}", hint) from first

    def _next_group(self, timeout_s: float) -> list[_Job]:
        """Return the oldest jobs that fit into one transaction, at least one if there is any."""
        with self._condition:
            if not self._jobs and not self._stopping:
                self._condition.wait(timeout_s)
            group: list[_Job] = []
            size_bytes = 0
            for job in islice(self._jobs, _MAX_GROUP_JOBS):
                size_bytes += job.size_bytes
                if group and size_bytes > self.max_group_bytes:
                    break
                group.append(job)
            return group

    def _commit_group(self, group: Sequence[_Job]) -> None:
        error = self._try([job.request for job in group])
        if error is None or len(group) == 1:
            self._done(len(group), error)
            return
        for job in group:
            self._done(1, self._try([job.request]))

    def _try(self, requests: Sequence[PutRequest]) -> Exception | None:
        try:
            self._commit(requests)
        except Exception as error:  # noqa: BLE001 - reported by the next call
            return error
        return None

    def _done(self, num_jobs: int, error: Exception | None) -> None:
        with self._condition:
            # Jobs leave the queue only now: until then, lookups know to wait for them.
            for _ in range(num_jobs):
                self._pending_bytes -= self._jobs.popleft().size_bytes
            self.num_done += num_jobs
            if error is not None:
                self._failures.append(error)
            self._condition.notify_all()


def _run(reference: weakref.ref[WriteBehind]) -> None:
    # A weak reference, so that an engine that was forgotten, not closed, does not live on in its thread.
    while True:
        queue = reference()
        if queue is None or (queue._stopping and not queue._jobs):
            return
        group = queue._next_group(timeout_s=1.0)
        if group:
            queue._commit_group(group)
        del queue, group
