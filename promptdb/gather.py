"""Copying many pieces of memory at once, each of them contiguous, with a few threads.

A copy of one large tensor by torch is as fast. But torch shares every single copy among all of its threads and waits
for all of them: of many pieces, on a machine that does something else too, most of the time goes by waiting.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Copy = tuple[Any, memoryview]
"""Where to, a writable buffer, and where from: as many bytes."""

# Fewer are copied before a thread has woken up.
_LEAST_BYTES = 2 << 20
_MOST_THREADS = min(4, os.cpu_count() or 1)

_pool: ThreadPoolExecutor | None = None


def copy_all(copies: Sequence[Copy]) -> None:
    """Copy each piece. Sources, views of the memory map, are not needed any more when this returns or raises.

    Notes
    -----
    Thread safe. Copies of several MiB go to up to four threads, which take one after the other.
    """
    import numpy as np  # not before somebody copies: looking up needs none

    arrays = [(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)) for target, source in copies]
    waiting = iter(arrays)  # all threads take from it: a step of a list's iterator is one step of the interpreter
    threads = min(_MOST_THREADS, len(arrays))
    if sum(source.nbytes for _, source in arrays) < _LEAST_BYTES or threads < 2:
        _work(waiting)
        return
    helpers = [_helpers().submit(_work, waiting) for _ in range(threads - 1)]
    try:
        _work(waiting)
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _work(waiting: Iterator[tuple[Any, Any]]) -> None:
    import numpy as np

    for target, source in waiting:
        np.copyto(target, source)  # lets go of the interpreter


def _helpers() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(_MOST_THREADS - 1, thread_name_prefix="promptdb-copy")
    return _pool


def _after_fork() -> None:
    global _pool
    _pool = None  # its threads stayed with the parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
