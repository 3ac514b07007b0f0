"""Recorder: activations of prompts, computed where they are missing, kept beside the keys and values."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from promptdb import batch
from promptdb.activations import Series, entry_of
from promptdb.ambient import plain_torch
from promptdb.batch import BatchLimits
from promptdb.collector import Collector, dtype_name, encode_rows
from promptdb.errors import CorruptDataError, InputTypeError, ReadOnlyStoreError, StoreError, UnsupportedModelError
from promptdb.hook_binding import Binding, Where
from promptdb.hook_context import Hook, PrecomputeContext
from promptdb.hook_points import POINTS, canonical_name
from promptdb.hook_points import HookVariableNames as N
from promptdb.hook_wiring import Attachment, StopPass
from promptdb.keys import unpack_tokens
from promptdb.recordings import RecordedRows
from promptdb.rows import checked_point

if TYPE_CHECKING:
    from promptdb.cache import PromptCache
    from promptdb.db import PromptDB
    from promptdb.engine import Engine
    from promptdb.keys import Root
    from promptdb.snapshot import Match, Snapshot
    from promptdb.tokens import Prompt
    from promptdb.trie import Step

__all__ = ["Recorder", "Recording"]

# A span may go, or the model change, between two looks; who loses so often has another problem.
_ATTEMPTS = 3
# What one transaction holds at most, unless one prompt has more.
_GROUP_BYTES = 32 << 20
_PASS_TOKENS = 2048
_WIDE_PASS_TOKENS = 256  # where each token has a row as long as the text before it, in each head
# To run so many tokens that nobody asked for is cheaper than to load the past for another pass.
_GAP_TOKENS = 64

# Before the first layer.
_EARLY = (N.POST_TOK_EMBEDDINGS, N.POST_POS_EMBEDDINGS)


@dataclass(frozen=True)
class Recording:
    """What is recorded of one prompt. Tensors are read from the store when they are asked for.

    Attributes
    ----------
    root, packed : identity and packed tokens of the prompt.
    points : what was asked for: (point, layer) pairs, the layer None for points outside of layers.
    positions : which tokens were, rising.
    tokens_computed : how many tokens went through the model for it.
    """

    root: Root
    packed: bytes
    points: tuple[Where, ...]
    positions: Sequence[int]
    tokens_computed: int
    _db: PromptDB = field(repr=False)
    _dtype: str = field(repr=False)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The prompt's tokens."""
        return tuple(unpack_tokens(self.packed))

    def tensor(self, point: str, layer: int | None = None) -> torch.Tensor:
        """Return the recorded rows of a point: ``[len(positions), d]``; see :meth:`PromptDB.activations`."""
        series = Series(*checked_point(point, layer), self._dtype)
        return self._db.activations_of(self.root, self.packed, [series], self.positions)[0]

    def tensors(self) -> dict[Where, torch.Tensor]:
        """Return the recorded rows of all points that were asked for, by point and layer."""
        series = [Series(*where, self._dtype) for where in self.points]
        found = self._db.activations_of(self.root, self.packed, series, self.positions)
        return dict(zip(self.points, found, strict=True))


class Recorder:
    """Records points of an engine's model, each row of each prefix once.

    Parameters
    ----------
    engine : its store, model and tokenizer; with an intervention, what that makes of the points is recorded.
    points : names as in :class:`~promptdb.hook_points.HookVariableNames`, module paths, or TransformerLens' names.
    layers : for points that each layer has: an integer or several, negative ones from the last; all by default.
    positions : which tokens: an integer, a slice, or several integers, negative ones from the prompt's end; all by
        default.
    dtype : what rows are stored in; by default the model's.

    Raises
    ------
    InputTypeError
        No such point or layer.
    UnsupportedModelError
        A point that the model does not have, or the loss; scores and probabilities under hooks that are not causal; and
        engines that are strict.
    ReadOnlyStoreError
        The store cannot be written.

    Notes
    -----
    Thread safe: one recording at a time, like the engine's computations. A prompt whose keys and values are stored is
    not run again: only spans that lack a row are, on top of the stored past, up to the deepest layer wanted. Scores and
    probabilities have a pass of their own, with eager attention: keys and values are those of the model's own.
    """

    def __init__(
        self,
        engine: Engine,
        points: Sequence[str] | str,
        *,
        layers: int | Iterable[int] | None = None,
        positions: int | slice | Iterable[int] | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> None:
        if engine.strict:
            raise UnsupportedModelError(
                "a strict engine reuses only what was computed in one pass, which recordings do not tell",
                "record with Engine(strict=False)",
            )
        if engine.kv_codec:
            raise UnsupportedModelError(
                "activations after approximate keys and values would be approximate, too",
                "record with an engine without kv_codec",
            )
        if engine.db.readonly:
            raise ReadOnlyStoreError("a store that is open for reading cannot record", "open it without readonly")
        self.engine = engine
        self._dtype = dtype_name(engine.model.dtype if dtype is None else dtype)
        self._which = Hook(N.LOGITS, lambda x, pctx: None, positions=positions)  # knows how positions are counted
        names = [points] if isinstance(points, str) else list(points)
        self.points = tuple(dict.fromkeys(self._resolve(names, layers)))
        if not self.points:
            raise InputTypeError("nothing to record", "give at least one point and one layer")
        if not engine.is_causal and any(map(_is_pairwise, self.points)):
            raise UnsupportedModelError(
                "rows of scores end at their own token; under hooks that are not causal they would go on",
                "read them with a HookedModel",
            )

    def _resolve(self, names: Sequence[str], layers: int | Iterable[int] | None) -> Iterator[Where]:
        asked = list(layers) if isinstance(layers, Iterable) else layers
        for asked_name in names:
            canonical, _ = canonical_name(asked_name)
            point = POINTS.get(canonical)
            if canonical == N.UNREDUCED_LOSS:
                raise UnsupportedModelError(f"{canonical} is not recorded", "token_logprobs are the same, negated")
            hook = Hook(asked_name, lambda x, pctx: None)
            if point is not None and point.by_layer and hook.layers is None:
                hook = Hook(asked_name, hook.fn, layers=asked)
            for name, layer in Binding(self.engine.model, [hook]).hooks:
                yield name, layer if name in POINTS else None

    def run(self, prompts: Iterable[Any]) -> list[Recording]:
        """Make sure that all points of all prompts are recorded, durably.

        Parameters
        ----------
        prompts : each as for :meth:`Engine.get`. Their keys and values are stored as well.

        Returns
        -------
        list of Recording
            One for each prompt, in order.

        Raises
        ------
        As :meth:`Engine.get`; and QuotaExceededError, StoreFullError. What was recorded before is stored.

        Notes
        -----
        Prompts are computed together, as by :meth:`Engine.run`, where that is exact, and rows are stored in the
        transaction of their keys and values. With ``positions``, or in a store with a quota, one after the other.
        Memory: the points of a pass, of what is written behind, and of a prompt whose rows are computed later.
        """
        work = _Work(self.engine, self.points, self._dtype)
        with self.engine._lock, plain_torch(self.engine.device):
            try:
                with closing(self._stored(work, prompts)) as stored:  # which takes its hooks off, whatever happens
                    return [self._record(work, asked, computed) for asked, computed in stored]
            finally:
                work.commit()

    def _stored(self, work: _Work, prompts: Iterable[Any]) -> Generator[tuple[Prompt, int], None, None]:
        """Yield prompts whose keys and values are stored, and how many tokens were computed for each."""
        if self._which.positions is None and not self.engine.db.limits().quota_bytes:
            with work.watching(None):
                for result in batch.run(self.engine, prompts, limits=work.limits()):
                    yield result.asked, result.tokens_computed
            return
        # Which rows are wanted differs from prompt to prompt; or each may have to make room.
        for prompt in prompts:
            asked = self.engine.tokenize(prompt)
            yield asked, work.ensure_stored(asked, self._positions(asked))

    def _positions(self, asked: Prompt) -> Sequence[int]:
        rows = self._which.rows(0, asked.num_tokens, asked.num_tokens)
        return range(asked.num_tokens) if rows is None else tuple(rows)

    def _record(self, work: _Work, asked: Prompt, computed: int) -> Recording:
        total, positions = asked.num_tokens, self._positions(asked)
        for attempt in range(_ATTEMPTS):
            root = self.engine.root_of(asked.packed)
            if attempt:
                self.engine._extender.held = None  # the engine believes that it is stored
                computed += work.ensure_stored(asked, positions)
            match = work.match(root, asked.packed)
            if match.num_tokens < total:
                continue  # evicted, or removed: again
            missing = work.missing(match, positions)
            computed += work.compute(match, missing)
            if self.engine.root_of(asked.packed) == root and work.keep(match, missing):
                return Recording(root, asked.packed, self.points, positions, computed, self.engine.db, self._dtype)
        raise StoreError(
            f"{total} tokens could not be recorded: spans vanish, or the model changes, as fast as they are computed",
            "raise the store's quota, or record fewer prompts at once",
        )


Missing = dict[Where, dict[int, list[int]]]
"""By point and layer, by number of a match's step: positions that are to be recorded."""


class _Work:
    """One run of a recorder: what was seen, and what waits to be stored. Holds the engine's lock."""

    def __init__(self, engine: Engine, points: Sequence[Where], dtype: str) -> None:
        self._engine, self._points, self._dtype = engine, points, dtype
        self._collector = Collector()
        self._beside = Collector(one_cache=True)  # what goes into the store together with keys and values
        self._waiting: list[RecordedRows] = []
        self._waiting_bytes = 0
        self._pending: dict[tuple[bytes, Where], set[int]] = defaultdict(set)  # offsets that wait, by node

    @contextmanager
    def watching(self, positions: Sequence[int] | None) -> Iterator[None]:
        """Let rows of what the engine computes and stores go into the store with it.

        Parameters
        ----------
        positions : which tokens'; None: all.
        """
        points = [where for where in self._points if not _is_pairwise(where)]
        wanted = None if positions is None else set(positions)

        def rows(cache: PromptCache, start: int, end: int) -> list[tuple[Series, memoryview]]:
            if not self._beside.shows(cache):
                return []
            every = range(start, end)
            places = every if wanted is None else [at for at in every if at in wanted]
            found = [(Series(*where, self._dtype), self._beside.rows(where, places)) for where in points]
            offsets = [at - start for at in places]
            return [(series, encode_rows(series, runs, offsets, start)) for series, runs in found if runs]

        storer = self._engine._extender.storer
        before = storer.beside
        with self._hooked(self._beside, points, None):
            storer.beside = rows
            try:
                yield
            finally:
                storer.beside = before
                self._beside.clear()

    @contextmanager
    def _hooked(self, collector: Collector, points: Sequence[Where], last_layer: int | None) -> Iterator[None]:
        """Let a collector see points of the engine's passes, after the hooks of an intervention."""
        runner, intervention = self._engine._extender.runner, self._engine.intervention
        before = runner.attach

        def attach() -> AbstractContextManager[object]:
            hooks = [*(intervention.hooks if intervention is not None else ()), *collector.hooks(points)]
            pctx = PrecomputeContext(runner.model.config, hooks)
            return Attachment(runner.model, pctx, last_layer=last_layer, is_identified=True)

        runner.attach = attach
        try:
            yield
        finally:
            runner.attach = before

    def limits(self) -> BatchLimits:
        """Return how prompts are computed: not as rows of a batch, of which the collector makes nothing."""
        way = None if "packed" in self._engine._extender.runner.exact_ways else "single"
        return replace(BatchLimits.for_device(self._engine.device), way=way)

    def match(self, root: Root, packed: bytes) -> Match:
        """Return what is stored of a prompt, after waiting for what is being written."""
        return self._engine._extender.match(root, packed, use_held=False)

    def ensure_stored(self, asked: Prompt, positions: Sequence[int]) -> int:
        """Store keys and values of a prompt, and rows of points with them; return how many tokens were computed."""
        root = self._engine.root_of(asked.packed)
        if self.match(root, asked.packed).num_tokens == asked.num_tokens:
            return 0
        if self._engine.db.limits().quota_bytes:
            self.commit()  # spans of what waits may have to go for this prompt
        with self.watching(positions):
            found = self._engine.get(asked)
        self._engine._extender.storer.queue.flush()
        return found.tokens_computed

    def missing(self, match: Match, positions: Sequence[int]) -> Missing:
        """Return what is to be recorded of a prompt that is stored."""
        found: Missing = {}
        with self._engine.db.read() as snapshot:
            for where in self._points:
                at = 0
                by_step = found[where] = {}
                for number, step in enumerate(match.steps):
                    begin, at = at, bisect_left(positions, step.end, at)
                    if at > begin:
                        stored = self._stored(snapshot, step, where)
                        wanted = positions[begin:at]
                        if isinstance(stored, range) and wanted[-1] - step.start < len(stored):
                            continue  # the usual case, without looking at each token
                        lacking = [each for each in wanted if each - step.start not in stored]
                        if lacking:
                            by_step[number] = lacking
        return found

    def _stored(self, snapshot: Snapshot, step: Step, where: Where) -> Collection[int]:
        """Return which tokens of a span have their row, in the store or waiting for it; a range is its first ones."""
        waiting = self._pending.get((step.node, where), ())
        try:
            entry = entry_of(snapshot, step.node, Series(*where, self._dtype), step.span_tokens, step.start)
        except CorruptDataError:
            return waiting  # written again, over what is damaged
        if not waiting:
            return () if entry is None else entry.tokens() if entry.offsets is None else set(entry.offsets)
        return {*waiting, *(() if entry is None else entry.tokens())}

    def compute(self, match: Match, missing: Missing) -> int:
        """Run what is missing, on top of the stored past; return how many tokens were run."""
        extender = self._engine._extender
        token_ids = torch.tensor(unpack_tokens(match.packed), dtype=torch.int64, device="cpu")
        total = 0
        self._collector.clear()
        unseen = {where: set().union(*by_step.values()) for where, by_step in missing.items() if by_step}
        pass_tokens = _WIDE_PASS_TOKENS if any(map(_is_pairwise, unseen)) else _PASS_TOKENS
        ranges = _ranges(unseen)
        if ranges and not extender.runner.is_causal:
            ranges, pass_tokens = [(0, len(token_ids))], len(token_ids)
        for start, end in ranges:
            cache = extender.cache_of(match, start)
            if cache is None:
                return total  # a span has gone
            extender.runner.check_mode()
            extender.runner.check_placement()
            for first in range(start, end, pass_tokens):
                last = min(first + pass_tokens, end)
                with self._hooked(self._collector, list(unseen), _deepest(unseen)), _stopping():
                    extender.runner.step(token_ids, cache, first, last)
                total += last - first
        return total

    def keep(self, match: Match, missing: Missing) -> bool:
        """Encode what was seen, to be stored; return whether everything that is missing was seen."""
        for where, by_step in missing.items():
            for number, positions in by_step.items():
                step = match.steps[number]
                rows = self._collector.rows(where, positions)
                if not rows:
                    return False
                series = Series(*where, self._dtype)
                offsets = [position - step.start for position in positions]
                value = encode_rows(series, rows, offsets, step.start)
                self._waiting.append(RecordedRows(step.node, series, value))
                self._waiting_bytes += len(value)
                self._pending[step.node, where].update(offsets)
        if self._waiting_bytes >= _GROUP_BYTES:
            self.commit()
        return True

    def commit(self) -> None:
        """Store what waits.

        Raises
        ------
        StoreError
            A span went before its rows were stored; or as :meth:`PromptDB.put_activations`.
        """
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        self._pending.clear()
        self._collector.clear()
        report = self._engine.db.put_activations(waiting)
        if report.num_dropped:
            raise StoreError(
                f"{report.num_dropped} recorded spans were removed from the store before their rows were written",
                "raise the store's quota; running again records them",
            )


def _is_pairwise(where: Where) -> bool:
    return where[0] in POINTS and POINTS[where[0]].is_pairwise


def _deepest(points: Iterable[Where]) -> int | None:
    """Return the last layer that has to be run for points, or None if all of the model has."""
    layers = []
    for name, layer in points:
        if name not in _EARLY and layer is None:
            return None
        layers.append(layer or 0)
    return max(layers)


def _ranges(unseen: Mapping[Where, set[int]]) -> list[tuple[int, int]]:
    """Return rising ranges of positions that have to go through the model."""
    ranges: list[tuple[int, int]] = []
    for position in sorted(set().union(*unseen.values())):
        if ranges and position - ranges[-1][1] <= _GAP_TOKENS:
            ranges[-1] = (ranges[-1][0], position + 1)
        else:
            ranges.append((position, position + 1))
    return ranges


@contextmanager
def _stopping() -> Iterator[None]:
    try:
        yield
    except StopPass:
        return
