"""What the next prompts lack is fetched from the shared store while the model computes those before them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from promptdb.errors import PromptDBError
from promptdb.extender import Extender
from promptdb.keys import Root
from promptdb.tokens import Prompt

Item = TypeVar("Item")


class Prefetch:
    """Fetches for one window of prompts at a time, in a thread of its own. Belongs to one batch.

    Memory and connections are those of one fetch: values go to the local store as they come.
    """

    def __init__(self, extender: Extender) -> None:
        self._extender = extender
        self._stop = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        self._begun: tuple[Root, Sequence[Prompt], Future[bool]] | None = None

    def begin(self, root: Root, prompts: Sequence[Prompt]) -> None:
        """Start to fetch what prompts lack. Nothing if there is no shared store."""
        if self._extender.tier is None or self._begun is not None:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "promptdb-prefetch")
        self._begun = root, prompts, self._pool.submit(self._extender.fetch, root, prompts, self._stop)

    def finish(self, root: Root, prompts: Sequence[Prompt]) -> bool:
        """Wait for what was begun; return whether that was for these prompts.

        Raises
        ------
        SharedError
            The far side failed, and is required.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return False
        begun[2].result()
        return begun[0] == root and begun[1] is prompts

    def close(self) -> None:
        """Stop after the value that is under way."""
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if self._begun is not None and not self._begun[2].cancelled():
            with suppress(PromptDBError):  # of prompts that nobody asks for any more
                self._begun[2].result()


def with_next(items: Iterator[Item]) -> Iterator[tuple[Item, Item | None]]:
    """Yield each item with the one after it, or None. What goes wrong with that one is raised when it is due."""
    current = next(items, None)
    while current is not None:
        following: Item | None = None
        failure: Exception | None = None
        try:
            following = next(items, None)
        except Exception as error:  # noqa: BLE001 - raised below
            failure = error
        yield current, following
        if failure is not None:
            raise failure
        current = following
