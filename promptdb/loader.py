"""Reading stored representations for an engine: what is gone is a miss, what is damaged is taken out and is a miss."""

from __future__ import annotations

import logging
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from promptdb.cache import PromptCache
from promptdb.cost import CostModel
from promptdb.errors import CorruptDataError
from promptdb.keys import prefix_digests
from promptdb.kv import copy_of, load_cache, load_logprobs
from promptdb.snapshot import Match

if TYPE_CHECKING:
    from promptdb.db import PromptDB

logger = logging.getLogger("promptdb")


class Loader:
    """Reads matches of one store. Thread safe."""

    def __init__(self, db: PromptDB) -> None:
        self._db = db

    def complete(self, match: Match, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what a full hit needs: last logits ``[vocabulary]`` and log-probabilities ``[n]`` (NaN first).

        Neither keys nor values are read. None if something is gone or damaged.
        """
        (end,) = prefix_digests(match.root.digest, match.packed, [match.num_tokens])
        try:
            with self._db.read() as snapshot:
                logprobs = load_logprobs(snapshot, match, match.num_tokens)
                view = snapshot.logits(end)
                if logprobs is None or view is None:
                    return None
                return copy_of(view).to(device), logprobs
        except CorruptDataError as error:
            self._heal(match, error)
            return None

    def logits(self, match: Match) -> torch.Tensor | None:
        """Return the logits ``[vocabulary]`` after a match, on the CPU, or None if they are not stored or damaged."""
        if not match.has_logits:
            return None
        (end,) = prefix_digests(match.root.digest, match.packed, [match.num_tokens])
        try:
            with self._db.read() as snapshot:
                view = snapshot.logits(end)
                return None if view is None else copy_of(view)
        except CorruptDataError as error:
            self._heal(match, error)
            return None

    def prefix(
        self, match: Match, num_tokens: int, capacity: int, device: torch.device, cost: CostModel
    ) -> tuple[PromptCache, torch.Tensor] | None:
        """Return a cache with the first ``num_tokens`` tokens of a match, and the log-probabilities of all its tokens.

        None if something is gone or damaged: look up again.
        """
        began = perf_counter()
        try:
            with self._db.read() as snapshot:
                logprobs = load_logprobs(snapshot, match, match.num_tokens)
                loaded = load_cache(snapshot, match, num_tokens, capacity, device)
        except CorruptDataError as error:
            self._heal(match, error)
            return None
        if loaded is None or logprobs is None:
            return None
        cost.loaded(loaded[1], perf_counter() - began)
        return loaded[0], logprobs

    def _heal(self, match: Match, error: CorruptDataError) -> None:
        """Take what is damaged out of the store, so that it is computed and stored again."""
        what = f"span {error.node[:8].hex()}" if error.node else f"logits after {match.num_tokens} tokens"
        logger.warning("%s: %s; computed again", what, error.message)
        if self._db.readonly:
            return
        if error.node:
            with suppress(KeyError):  # somebody else was faster
                self._db.remove(error.node, only=True)
        else:
            (end,) = prefix_digests(match.root.digest, match.packed, [match.num_tokens])
            self._db.remove_logits(match.root, end)
