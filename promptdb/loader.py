"""Reading stored representations for an engine: what is gone is a miss, what is damaged is taken out and is a miss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from promptdb.buffers import POOL, Slab
from promptdb.cache import PromptCache
from promptdb.cost import CostModel
from promptdb.errors import CorruptDataError
from promptdb.events import warn
from promptdb.format import Layout
from promptdb.kv import ScoreReader, copy_of, load_cache, load_scores, span_copies, stored_layout
from promptdb.scores import TokenScores
from promptdb.served import Served
from promptdb.snapshot import Match
from promptdb.staging import copy_to_device

if TYPE_CHECKING:
    from promptdb.db import PromptDB


class Loader:
    """Reads matches of one store. Thread safe."""

    def __init__(self, db: PromptDB) -> None:
        self._db = db
        self.num_healed = 0  # how often something damaged was taken out

    def complete(self, match: Match, device: torch.device) -> tuple[torch.Tensor, TokenScores] | None:
        """Return what a full hit needs: last logits ``[vocabulary]`` and the scores of all tokens.

        Neither keys nor values are read. None if something is gone or damaged.
        """
        try:
            with self._db.read() as snapshot:
                scores = load_scores(snapshot, match, match.num_tokens)
                view = snapshot.logits(match.end_digest)
                if scores is None or view is None:
                    return None
                return copy_of(view).to(device), scores
        except CorruptDataError as error:
            self._heal(match, error)
            return None

    def logits(self, match: Match) -> torch.Tensor | None:
        """Return the logits ``[vocabulary]`` after a match, on the CPU, or None if they are not stored or damaged."""
        if not match.has_logits:
            return None
        try:
            with self._db.read() as snapshot:
                view = snapshot.logits(match.end_digest)
                return None if view is None else copy_of(view)
        except CorruptDataError as error:
            self._heal(match, error)
            return None

    def prefix(
        self, match: Match, num_tokens: int, capacity: int, device: torch.device, cost: CostModel
    ) -> tuple[PromptCache, TokenScores] | None:
        """Return a cache with the first ``num_tokens`` tokens of a match, and the scores of all its tokens.

        None if something is gone or damaged: look up again.
        """
        began = perf_counter()
        try:
            with self._db.read() as snapshot:
                scores = load_scores(snapshot, match, match.num_tokens)
                loaded = load_cache(snapshot, match, num_tokens, capacity, device)
        except CorruptDataError as error:
            self._heal(match, error)
            return None
        if loaded is None or scores is None:
            return None
        cost.loaded(loaded[1], perf_counter() - began)
        return loaded[0], scores

    def many(
        self, matches: Sequence[Match], *, want_logits: bool, device: torch.device
    ) -> list[tuple[TokenScores, torch.Tensor | None] | None]:
        """Return the scores of all stored tokens of each match, and its last logits if it is complete.

        Without ``want_logits``, no logits are read. None for a match of which something is gone or damaged: look it up
        again.
        """
        found: list[tuple[TokenScores, torch.Tensor | None] | None] = []
        damaged: list[tuple[Match, CorruptDataError]] = []
        slab = Slab(POOL)
        with self._db.read() as snapshot:
            reader = ScoreReader(snapshot)
            for match in matches:
                try:
                    scores = reader.read(match, match.num_tokens)
                    view, is_wanted = None, want_logits and match.is_complete
                    if is_wanted:
                        view = snapshot.logits(match.end_digest)
                    is_gone = scores is None or (is_wanted and view is None)
                    logits = None if view is None else copy_of(view, slab).to(device)
                    found.append(None if is_gone or scores is None else (scores, logits))
                except CorruptDataError as error:
                    damaged.append((match, error))
                    found.append(None)
        for match, reason in damaged:
            self._heal(match, reason)
        return found

    def layout(self, match: Match) -> Layout | None:
        """Return how the keys and values of a match are laid out, or None if they are gone or damaged."""
        try:
            with self._db.read() as snapshot:
                return stored_layout(snapshot, match)
        except CorruptDataError as error:
            self._heal(match, error)
            return None

    def into(
        self,
        parts: Sequence[tuple[Match, int, int, int]],
        layout: Layout,
        stacks: Sequence[torch.Tensor],
        device: torch.device,
        cost: CostModel,
    ) -> bool:
        """Read parts of matches into a cache: positions ``[start, end)`` to slots from ``slot`` on.

        Parameters
        ----------
        parts : (match, start, end, slot) of each.

        Returns
        -------
        bool
            False if something is gone or damaged: look up again.
        """
        began = perf_counter()
        size_bytes = 0
        match = parts[0][0]
        try:
            with self._db.read() as snapshot:
                copies = []
                for match, start, end, slot in parts:
                    found = span_copies(snapshot, match, start, end, layout, stacks, slot)
                    if found is None:
                        return False
                    copies += found
                copy_to_device(copies, device)
                size_bytes = sum(source.nbytes for _, source in copies)
        except CorruptDataError as error:
            self._heal(match, error)
            return False
        cost.loaded(size_bytes, perf_counter() - began)
        return True

    def _heal(self, match: Match, error: CorruptDataError) -> None:
        """Take what is damaged out of the store, so that it is computed and stored again."""
        what = f"span {error.node[:8].hex()}" if error.node else f"logits after {match.num_tokens} tokens"
        warn(
            "damage",
            f"{what}: {error.message}; computed again",
            node=error.node.hex(),
            weights_id=match.root.weights_id,
        )
        if self._db.readonly:
            return
        self.num_healed += 1
        self._db.count_served(match.root.weights_id, Served(num_quarantined=1))
        if error.node:
            with suppress(KeyError):  # somebody else was faster
                self._db.remove(error.node, only=True)
        else:
            self._db.remove_logits(match.root, match.end_digest)
