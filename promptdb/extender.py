"""From a lookup to a representation: hit, or load and extend. What an :class:`~promptdb.Engine` does once it knows who
it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from promptdb.ambient import is_watched
from promptdb.cache import PromptCache, bytes_per_token, layout_of
from promptdb.cost import CostModel
from promptdb.errors import CorruptDataError, NonFiniteError
from promptdb.events import warn
from promptdb.format import Layout
from promptdb.keys import Root, common_prefix, num_tokens, unpack_tokens
from promptdb.kv import KvSource
from promptdb.loader import Loader
from promptdb.pulling import Want
from promptdb.representation import Representation
from promptdb.runner import Runner
from promptdb.scores import TokenScores, token_scores
from promptdb.shared import connect
from promptdb.snapshot import Match
from promptdb.storer import Storer
from promptdb.tokens import Prompt
from promptdb.trie import KnownSpans, cut
from promptdb.version import __version__

if TYPE_CHECKING:
    from promptdb.db import PromptDB


Fetch = Callable[[int | None], PromptCache]

# Room that a cache has beyond its tokens, so that the first tokens appended do not move it.
SPARE_TOKENS = 64


@dataclass(frozen=True)
class Held:
    """The last computation, kept in memory: its prompt is likely to be asked for, or continued, next."""

    root: Root
    packed: bytes
    cache: PromptCache
    scores: TokenScores
    logits: torch.Tensor  # [vocabulary], after the last token
    is_stored: bool  # or about to be
    is_private: bool  # neither hooks nor modes of torch, which may keep what they see, saw the cache's tensors

    def shared_tokens(self, root: Root, packed: bytes) -> int:
        """Return how many tokens of a prompt are held."""
        return common_prefix(self.packed, packed) if self.root == root else 0


def nothing_found(root: Root, packed: bytes) -> Match:
    """Return the match of a prompt of which nothing may be believed: all is computed, and nothing stored."""
    return Match(root, packed, (), 0, has_logits=False, is_damaged=True)


class Extender:
    """Matches, loads, computes and stores for one model at a time. Computing is not thread safe; the rest is.

    Parameters
    ----------
    db : the store.
    runner : the model. To be replaced, with ``layout`` and ``cost``, when the model has changed.
    strict : reuse only what was computed the same way, and in one pass.
    write_behind : commit in a background thread.
    """

    def __init__(self, db: PromptDB, runner: Runner, *, strict: bool, write_behind: bool) -> None:
        self.db = db
        self.runner = runner
        self.cost = CostModel()
        self.storer = Storer(db, write_behind=write_behind)
        self.held: Held | None = None
        self._held_lock = threading.Lock()  # of who begins to read the held cache, or takes it over
        self._num_readers = 0
        self._strict = strict
        self.loader = Loader(db)
        self.tier = connect(db)
        self.layout: Layout = ()

    def replace_runner(self, runner: Runner) -> None:
        """Go on with a model that has changed."""
        self.runner, self.layout, self.held = runner, (), None

    # Looking up

    def match(self, root: Root, packed: bytes, *, use_held: bool = True) -> Match:
        """Find what is stored of a prompt, waiting for what is being written of it, unless it is held in memory.

        Parameters
        ----------
        use_held : without it, what is held does not count, and everything queued is waited for.
        """
        queue = self.storer.queue
        done_before = queue.num_done
        match = self._match(root, packed)
        held, total = self.held if use_held else None, num_tokens(packed)
        shared = self._held_tokens(held, root, packed)
        # A part of what is held lacks its logits, which may be on their way to the store.
        is_part = shared == total and held is not None and held.packed != packed
        is_wanted = not match.is_complete and (shared <= match.num_tokens or is_part)
        if is_wanted:
            has_waited = queue.wait_for(root, packed, match.num_tokens, has_logits=match.has_logits)
            # What was committed between the look and the question is in neither.
            if has_waited or queue.num_done != done_before:
                match = self._match(root, packed)
        return self._strictly(match) if self._strict and not match.is_damaged else match

    def pull(self, root: Root, prompts: Sequence[Prompt], *, store: bool) -> bool:
        """Fetch from the shared store, if there is one, what the local one lacks of prompts; return whether it got any.

        Parameters
        ----------
        store : what is still missing then is computed and stored: see :meth:`settle`.
        """
        found = self.fetch(root, prompts)
        return (store and self.settle(root, prompts)) or found

    def fetch(self, root: Root, prompts: Sequence[Prompt], stop: threading.Event | None = None) -> bool:
        """Fetch what the local store lacks of prompts; return whether anything came. Thread safe.

        What is held in memory needs nothing. Waits for what is being written of a prompt.

        Parameters
        ----------
        stop : when it is set, no more is fetched.
        """
        if self.tier is None:
            return False
        wants, rate = self._wants(root, prompts), self.cost.rates.get("compute_tokens_per_s")
        return bool(wants) and self.tier.pull(root, wants, rate, stop) > 0

    def settle(self, root: Root, prompts: Sequence[Prompt]) -> bool:
        """Tell others that what is missing is computed here; return whether anything came.

        If they compute it already, they are waited for as long as that is sooner.
        """
        if self.tier is None:
            return False
        rates = self.cost.rates
        return self.tier.leases.settle(
            root,
            lambda: self._wants(root, prompts),
            rates.get("compute_tokens_per_s"),
            rates.get("kv_bytes_per_token"),
        )

    def give_up(self) -> None:
        """Let other machines know that what was to be computed here will not be."""
        if self.tier is not None:
            self.tier.leases.give_up()

    def _wants(self, root: Root, prompts: Sequence[Prompt]) -> list[Want]:
        """Return the prompts of which the local store has too little."""
        wants = []
        for prompt in prompts:
            packed = prompt.packed
            if self._held_tokens(self.held, root, packed) == prompt.num_tokens:
                continue
            self.storer.queue.wait_for(root, packed, 0, has_logits=False)
            match = self._match(root, packed)
            if not match.is_complete and not match.is_damaged:
                wants.append(Want(packed, prompt.boundaries, match.num_tokens, match.has_logits))
        return wants

    def _match(self, root: Root, packed: bytes) -> Match:
        return self.match_all(root, [packed])[0]

    def match_all(self, root: Root, prompts: Sequence[bytes]) -> list[Match]:
        """Find what is stored of many prompts at one moment. Does not wait for what is being written."""
        try:
            with self.db.read() as snapshot:
                known: KnownSpans = {}
                return [snapshot.match(root, packed, known) for packed in prompts]
        except CorruptDataError as error:
            # Only the whole store can be put right, which is not a lookup's business.
            warn("index_damaged", f"the index is damaged, so nothing is found and nothing stored: {error}")
            return [nothing_found(root, packed) for packed in prompts]

    def _strictly(self, match: Match) -> Match:
        """Cut a match off where a span was not computed the same way, or not in one pass."""
        here = self.runner.provenance()
        with self.db.read() as snapshot:
            for number, step in enumerate(match.steps):
                try:
                    record = snapshot.record(step.node)
                except CorruptDataError:
                    record = None
                # Beside other prompts, in one sequence or as rows of a batch, is another computation.
                same = (
                    record is not None
                    and record.provenance.get("past_tokens") == 0
                    and record.provenance.get("way", "plain") == "plain"
                )
                if record is None or not same or any(record.provenance.get(name) != here[name] for name in here):
                    return Match(match.root, match.packed, match.steps[:number], step.start, has_logits=False)
        # Logits inside a span came from another run than the span.
        at_end = bool(match.steps) and match.steps[-1].num_tokens == match.steps[-1].span_tokens
        return Match(match.root, match.packed, match.steps, match.num_tokens, match.has_logits and at_end)

    def _held_tokens(self, held: Held | None, root: Root, packed: bytes) -> int:
        """Return how many tokens of a prompt may be taken from what is, or was a moment ago, held."""
        if held is None:
            return 0
        shared = held.shared_tokens(root, packed)
        # Strictly, another prompt's pass is another computation; what is held was computed in one pass then.
        return shared if not self._strict or held.packed == packed else 0

    # Full hits

    def hit(self, match: Match, fetch: Fetch, began: float, *, store: bool) -> Representation | None:
        """Return the representation of a prompt that is held or stored in full, or None if it is not, or damaged.

        What is held and was not stored does not count if it is to be stored now.
        """
        looked_up = perf_counter()
        held, found = self.held, None
        if match.is_complete:
            found = self.loader.complete(match, self.runner.device)
        elif (
            held is not None
            and (held.root, held.packed) == (match.root, match.packed)
            and (held.is_stored or not store or self.db.readonly)
        ):
            found = held.logits.clone(), held.scores.clone()
        if found is None:
            return None
        return Representation(
            packed=match.packed,
            logits=found[0],
            token_logprobs=found[1].logprobs[1:],
            greedy_ids=found[1].greedy_ids[1:],
            tokens_loaded=num_tokens(match.packed),
            tokens_computed=0,
            lookup_s=looked_up - began,
            load_s=perf_counter() - looked_up,
            _fetch=fetch,
        )

    # Extending

    def extend(
        self,
        asked: Prompt,
        match: Match,
        fetch: Fetch,
        *,
        keep_all: bool,
        store: bool,
        began: float,
        still_valid: Callable[[], bool],
    ) -> Representation | None:
        """Load what is stored or held of a prompt, compute the rest, and store it.

        Parameters
        ----------
        still_valid : asked after the forward pass: whether the model is still the one of ``match.root``.

        Returns
        -------
        Representation or None
            None if a stored span vanished or was damaged, or the model changed: look up again.
        """
        runner, root, total = self.runner, match.root, asked.num_tokens
        token_ids = torch.tensor(unpack_tokens(asked.packed), dtype=torch.int64, device="cpu")
        runner.check_placement()
        runner.check_prompt(asked.packed)
        looked_up = perf_counter()
        prefix = self._prefix(match, total, from_start=keep_all or self._strict or not runner.is_causal)
        if prefix is None:
            return None
        start, cache, scores, first_new = prefix
        load_s = perf_counter() - looked_up

        computing = perf_counter()
        spans = cut(first_new, total, asked.boundaries, self.db.chunk_tokens)
        # Logits at the ends of spans, and where this prompt parts from a stored one: the next branch starts there.
        wanted = {end - 1 for _, end in spans} | {total - 1, first_new - 1}
        result = runner.extend(token_ids, cache, start, {at for at in wanted if at >= start}, keep_all=keep_all)
        scores[start + 1 :] = result.scores
        if torch.isnan(scores.logprobs[1:]).any():
            raise NonFiniteError(
                "the log-probabilities hold NaN; nothing was stored", "check the model's weights and dtype"
            )
        compute_s = perf_counter() - computing
        self.cost.computed(total - start, compute_s)
        if not still_valid():
            return None

        storing = perf_counter()
        self.layout = layout = layout_of(cache)
        is_stored = store and not self.db.readonly and not match.is_damaged
        if is_stored:
            self.cost.sized(bytes_per_token(layout))
            provenance = {
                "promptdb": __version__,
                **runner.provenance(),
                "past_tokens": start,
                "pass_tokens": total - start,
            }
            self.storer.store(
                root,
                asked.packed,
                spans,
                KvSource(cache, first_new),
                scores[first_new:],
                result.logits,
                compute_s_per_token=compute_s / (total - start),
                provenance=provenance,
            )
        last = result.logits[total - 1]
        self.held = Held(root, asked.packed, cache, scores, last, is_stored, self._is_private())
        kept = scores[1:].clone()
        return Representation(
            packed=asked.packed,
            # Copies: what the caller does with them must not reach what is held.
            logits=last.clone() if result.all_logits is None else result.all_logits,
            token_logprobs=kept.logprobs,
            greedy_ids=kept.greedy_ids,
            tokens_loaded=start,
            tokens_computed=total - start,
            lookup_s=looked_up - began,
            load_s=load_s,
            compute_s=compute_s,
            store_s=perf_counter() - storing,
            _fetch=fetch,
        )

    def _prefix(
        self, match: Match, total: int, *, from_start: bool
    ) -> tuple[int, PromptCache, TokenScores, int] | None:
        """Return where computing starts, the cache and scores before it, and the first token to store.

        The scores of the first computed token need the logits after the token before it. Where those are not at hand,
        and where a full hit lacks its last logits, one token is computed again.
        """
        runner, capacity = self.runner, total + SPARE_TOKENS
        scores = TokenScores.unknown(total)
        held, known = self.held, match.num_tokens
        shared = 0 if from_start else self._held_tokens(held, match.root, match.packed)
        before: torch.Tensor | None = None
        # Of what is stored as well, the held copy is at hand; unless what is stored is not the same numbers.
        if held is not None and (shared > known or (0 < shared == known and not match.root.kv_codec)):
            if shared == len(held.scores) < total:
                before = held.logits.cpu()
            elif shared == known < total:
                before = self.loader.logits(match)
            known, first_new = shared, shared if held.is_stored else match.num_tokens
        else:
            held, first_new = None, match.num_tokens
            if not from_start and known < total:
                before = self.loader.logits(match)
        start = known if before is not None else max(0, known - 1)
        if from_start or (held is None and not self.cost.should_load(start)):
            start = 0
        if start == 0:
            cache = PromptCache(capacity)
            if self.layout:  # known from the last computation: one tensor per group of layers, not two per layer
                cache = PromptCache.of_layout(self.layout, 0, capacity, runner.device)
        elif held is not None:
            scores[:known] = held.scores[:known]
            cache = self._continued(held, start, total)
        else:
            loaded = self.loader.prefix(match, start, capacity, runner.device, self.cost)
            if loaded is None:
                return None
            cache, scores[:known] = loaded
        if start and before is not None:
            token = unpack_tokens(match.packed[4 * known : 4 * known + 4])[0]
            scores[known : known + 1] = token_scores(before[None], torch.tensor([token], device="cpu"))
        return start, cache, scores, first_new

    def _is_private(self) -> bool:
        """Whether the cache of a pass stays between promptdb and the model."""
        return self.runner.attach is nullcontext and not is_watched()

    def _continued(self, held: Held, num_tokens: int, total: int) -> PromptCache:
        """Return a cache with the first tokens of the held one, and room for ``total``: the held one itself, or a copy.

        Questions after the same context, and turns of a conversation, then cost no copy of what they share. Nothing is
        held any more if it was the held one itself. A cache that is far too large is left to be freed.
        """
        with self._held_lock:
            is_free = held is self.held and not self._num_readers and held.is_private and self._is_private()
            goes_on = is_free and total <= held.cache.room() <= 2 * (total + SPARE_TOKENS)
            if goes_on:
                self.held = None  # before its last tokens are written over
        if not goes_on:
            return held.cache.copy(num_tokens, total + SPARE_TOKENS)
        held.cache.rewind(num_tokens)
        return held.cache

    @contextmanager
    def _reading_held(self) -> Iterator[Held | None]:
        """Give what is held to who reads its cache; nobody continues it meanwhile."""
        with self._held_lock:
            self._num_readers += 1
            held = self.held
        try:
            yield held
        finally:
            with self._held_lock:
                self._num_readers -= 1

    # Keys and values

    def cache_of(self, match: Match, num_tokens: int) -> PromptCache | None:
        """Return a fresh cache with the first tokens of a prompt, or None if they are neither held nor stored."""
        if num_tokens == 0:
            return PromptCache(SPARE_TOKENS)
        with self._reading_held() as held:
            if held is not None and self._held_tokens(held, match.root, match.packed) >= num_tokens:
                return held.cache.copy(num_tokens, num_tokens + SPARE_TOKENS)
        if match.num_tokens < num_tokens:
            return None
        capacity = num_tokens + SPARE_TOKENS
        loaded = self.loader.prefix(match, num_tokens, capacity, self.runner.device, self.cost)
        return None if loaded is None else loaded[0]
