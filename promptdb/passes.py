"""Runs the sections of a batch through the model: caches in, scores, logits and stored spans out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import DynamicCache

from promptdb.cache import PromptCache, bytes_per_token, layout_of
from promptdb.errors import NonFiniteError
from promptdb.format import Layout
from promptdb.keys import TOKEN_BYTES, Root, unpack_tokens
from promptdb.kv import KvSource
from promptdb.levels import Levels, Row
from promptdb.plan import Limits, Piece, Section, sections
from promptdb.scores import TokenScores, token_scores
from promptdb.snapshot import Match
from promptdb.tree import Branch, Segment
from promptdb.trie import cut
from promptdb.version import __version__

if TYPE_CHECKING:
    from promptdb.extender import Extender


class VanishedError(Exception):
    """Somebody removed what this batch stands on, or it was damaged: look up again."""


@dataclass
class _Slots:
    """A cache and what its slots hold: pieces in the order of their slots."""

    cache: PromptCache
    pieces: list[Piece]
    last: torch.Tensor | None = None  # logits after the last of them, where rows run side by side

    def find(self, piece: Piece) -> Iterator[tuple[int, int, int]]:
        """Yield (start, end, slot) of the parts of a piece that are here."""
        slot = 0
        for held in self.pieces:
            start, end = max(held.start, piece.start), min(held.end, piece.end)
            if held.segment == piece.segment and start < end:
                yield start, end, slot + start - held.start
            slot += held.num_tokens

    def copy(self, layout: Layout, stacks: Sequence[torch.Tensor], source: int, target: int, count: int) -> None:
        """Copy slots from here into another cache's stacks."""
        ours = self.cache.stacks(layout)
        for number, group in enumerate(layout):
            if ours is not None:
                stacks[number][:, :, target : target + count] = ours[number][:, :, source : source + count]
                continue
            for at, slot in enumerate(group.slots):
                states = self.cache.slot(slot)[0]
                stacks[number][at, :, target : target + count] = states[:, source : source + count]


class Passes:
    """One window of a batch on its way through the model. Belongs to whoever holds the engine's lock.

    Parameters
    ----------
    extender : has the model, the store, and the rates.
    root : identity that all is computed and stored under.
    segments, branches, matches : the tree, its prompts, and what is stored of each.
    want_logits : keep the logits after the last token of every prompt.
    store : write what is computed.
    still_valid : asked after every section: whether the model is still the one of ``root``.

    Attributes
    ----------
    scores : by segment, those of its tokens ``[stored, end)``.
    logits : by prompt, its last logits ``[vocabulary]``, of prompts that were computed.
    num_computed : by segment, how many tokens went through the model.
    """

    def __init__(
        self,
        extender: Extender,
        root: Root,
        segments: Sequence[Segment],
        branches: Sequence[Branch],
        matches: Sequence[Match],
        *,
        want_logits: bool,
        store: bool,
        still_valid: Callable[[], bool],
    ) -> None:
        self._extender, self._runner, self._root = extender, extender.runner, root
        self._segments, self._branches, self._matches = segments, branches, matches
        self._want_logits, self._store, self._still_valid = want_logits, store, still_valid
        self.scores = [TokenScores.unknown(segment.end - segment.stored) for segment in segments]
        self.logits: dict[int, torch.Tensor] = {}
        self.num_computed = [0] * len(segments)
        # Logits after segments that others, not run yet, begin after.
        self._ends: dict[int, torch.Tensor] = {}

    def run(self, limits: Limits) -> Iterator[int]:
        """Compute all that is missing; yield the number of tokens of each section when it is done.

        Raises
        ------
        VanishedError
            The store or the model changed. What was computed is stored.
        NonFiniteError
            A result holds NaN or infinity; it was not stored.
        """
        slots: _Slots | None = None
        for section in sections(self._segments, limits):
            slots = self._prepare(section, slots)
            began = perf_counter()
            wanted = [self._wanted(piece) for piece in section.new]
            run = self._run_chain if section.is_chain else self._run_packed
            scores, rows = run(section, slots.cache, wanted)
            self._finish(section, slots, scores, rows, perf_counter() - began)
            at = section.new[-1].segment
            self._ends = {number: row for number, row in self._ends.items() if self._segments[number].last > at}
            yield section.num_new

    def run_levels(self, limits: Limits) -> Iterator[int]:
        """Compute all that is missing, rows of one start and length at a time; as :meth:`run`."""
        levels: Levels[_Slots] = Levels(self._segments, limits)
        while rows := levels.take():
            self._run_rows(rows, levels)
            yield sum(row.piece.num_tokens for row in rows)

    # What a section stands on

    def _prepare(self, section: Section, before: _Slots | None) -> _Slots:
        """Return a cache with a section's past, from the cache of another one and from the store."""
        extender, total = self._extender, section.num_past + section.num_new
        layout = extender.layout
        if not layout and section.past:
            stored_layout = extender.loader.layout(self._matches[self._segments[section.past[0].segment].prompt])
            if not stored_layout:
                raise VanishedError
            layout = stored_layout
        if not layout:
            return _Slots(PromptCache(total), [*section.new])
        cache = PromptCache.of_layout(layout, section.num_past, total, self._runner.device)
        stacks = cache.stacks(layout) or []
        stored: list[tuple[Match, int, int, int]] = []
        slot = 0
        for piece in section.past:
            have = piece.start
            for start, end, source in before.find(piece) if before else ():
                if start > have:
                    stored.append(self._source(piece, have, start, slot))
                before.copy(layout, stacks, source, slot + start - piece.start, end - start)  # type: ignore[union-attr]
                have = end
            if have < piece.end:
                stored.append(self._source(piece, have, piece.end, slot))
            slot += piece.num_tokens
        if stored and not extender.loader.into(stored, layout, stacks, self._runner.device, extender.cost):
            raise VanishedError
        return _Slots(cache, [*section.past, *section.new])

    def _source(self, piece: Piece, start: int, end: int, slot: int) -> tuple[Match, int, int, int]:
        return self._matches[self._segments[piece.segment].prompt], start, end, slot + start - piece.start

    # The model

    def _finish(
        self,
        section: Section,
        slots: _Slots,
        scores: Sequence[TokenScores],
        rows: Sequence[dict[int, torch.Tensor]],
        compute_s: float,
        way: str = "",
    ) -> None:
        """Check what a section gave, keep what is needed of it, and store it."""
        for piece, found in zip(section.new, scores, strict=True):
            segment = self._segments[piece.segment]
            new = max(piece.start, segment.stored)
            known = found[new - piece.start :]
            if torch.isnan(known.logprobs[1 if new == 0 else 0 :]).any():
                raise NonFiniteError(
                    "the log-probabilities hold NaN; nothing was stored", "check the model's weights and dtype"
                )
            self.scores[piece.segment][new - segment.stored : piece.end - segment.stored] = known
            self.num_computed[piece.segment] += piece.num_tokens
        self._extender.cost.computed(section.num_new, compute_s)
        # A batch takes minutes: somebody may have gone on training.
        self._runner.check_mode()
        if not self._still_valid():
            raise VanishedError
        self._extender.layout = layout_of(slots.cache)
        self._keep(section, rows)
        if self._store:
            self._write(section, slots, rows, compute_s / section.num_new, way)

    def _wanted(self, piece: Piece) -> list[int]:
        """Return the positions after whose tokens logits are stored or needed: ends of spans, and the piece's end."""
        segment = self._segments[piece.segment]
        spans = self._spans(piece)
        again = {segment.stored - 1} if piece.start < segment.stored else set()
        wanted = {end - 1 for _, end in spans} | {piece.end - 1} | again
        if not self._want_logits and not segment.children and piece.end == segment.end:
            wanted.discard(piece.end - 1)  # a row of the vocabulary for each prompt, which nothing stands on
        return sorted(wanted)

    def _spans(self, piece: Piece) -> list[tuple[int, int]]:
        segment = self._segments[piece.segment]
        start = max(piece.start, segment.stored)
        return cut(start, piece.end, sorted(segment.boundaries), self._extender.db.chunk_tokens)

    def _tokens(self, piece: Piece) -> torch.Tensor:
        packed = self._branches[self._segments[piece.segment].prompt].packed
        return torch.tensor(
            unpack_tokens(packed[piece.start * TOKEN_BYTES : piece.end * TOKEN_BYTES]), dtype=torch.int64
        )

    def _before(self, piece: Piece) -> torch.Tensor | None:
        """Return the logits after the token before a piece, or None if its first token's score is not needed."""
        segment = self._segments[piece.segment]
        if piece.start == 0 or piece.start < segment.stored:
            return None
        if piece.start > segment.start and piece.segment in self._ends:
            return self._ends[piece.segment]  # the piece before it, of the same segment
        if piece.start == segment.start and segment.parent in self._ends:
            return self._ends[segment.parent]
        stored = self._extender.loader.logits(self._matches[segment.prompt])
        if stored is None:
            raise VanishedError
        return stored

    def _run_chain(
        self, section: Section, cache: PromptCache, wanted: Sequence[Sequence[int]]
    ) -> tuple[list[TokenScores], list[dict[int, torch.Tensor]]]:
        """Extend a path: the piece that comes last is on it as a whole."""
        start = section.new[0].start
        last = section.new[-1]
        token_ids = self._tokens(Piece(last.segment, 0, last.end))  # its prompt has the whole path
        result = self._runner.extend(token_ids, cache, start, {at for positions in wanted for at in positions})
        scores = TokenScores.unknown(len(token_ids) - start)
        scores[1:] = result.scores
        before = self._before(section.new[0])
        if before is not None:
            scores[:1] = token_scores(before[None].to(self._runner.device), token_ids[start : start + 1])
        return (
            [scores[piece.start - start : piece.end - start] for piece in section.new],
            [{at: result.logits[at] for at in positions} for positions in wanted],
        )

    def _run_packed(
        self, section: Section, cache: PromptCache, wanted: Sequence[Sequence[int]]
    ) -> tuple[list[TokenScores], list[dict[int, torch.Tensor]]]:
        """Run branches side by side in one sequence, each token seeing its ancestors."""
        pieces = [*section.past, *section.new]
        # Where the model is: a mask of thousands by thousands takes long to make on a CPU.
        device = self._runner.device
        numbers = torch.tensor([piece.num_tokens for piece in pieces], device=device)
        first = torch.tensor([piece.segment for piece in pieces], device=device).repeat_interleave(numbers)
        last = torch.tensor([self._segments[piece.segment].last for piece in pieces], device=device)
        last = last.repeat_interleave(numbers)
        positions = torch.cat([torch.arange(piece.start, piece.end) for piece in pieces]).to(device)
        past = section.num_past
        # In depth-first order a segment's subtree is a range of numbers.
        query = first[past:, None]
        visible = (first <= query) & (query < last) & (positions <= positions[past:, None])
        token_ids = torch.cat([self._tokens(piece) for piece in section.new])
        rows = self._runner.packed(token_ids, positions[past:], visible, positions[:past], cache)
        return self._take_out(section, rows, token_ids, wanted)

    def _take_out(
        self, section: Section, rows: torch.Tensor, token_ids: torch.Tensor, wanted: Sequence[Sequence[int]]
    ) -> tuple[list[TokenScores], list[dict[int, torch.Tensor]]]:
        """Return scores and logits of a packed section: each token's score is in the row of its parent."""
        offsets: list[int] = []
        ends: dict[tuple[int, int], int] = {}
        parents: list[int] = []
        unscored: list[int] = []  # first tokens of pieces whose parents are not in this section
        at = 0
        for piece in section.new:
            segment = self._segments[piece.segment]
            above = piece.segment if piece.start > segment.start else segment.parent
            parent = ends.get((above, piece.start), -1)
            if parent < 0:
                unscored.append(len(offsets))
            offsets.append(at)
            parents += [max(parent, 0), *range(at, at + piece.num_tokens - 1)]
            at += piece.num_tokens
            ends[piece.segment, piece.end] = at - 1
        scores = token_scores(rows, token_ids, torch.tensor(parents))
        for number in unscored:
            at, piece = offsets[number], section.new[number]
            before = self._before(piece)
            known = TokenScores.unknown(1)
            if before is not None:
                known = token_scores(before[None].to(rows.device), token_ids[at : at + 1])
            scores[at : at + 1] = known
        found, kept = [], []
        for piece, at, positions in zip(section.new, offsets, wanted, strict=True):
            found.append(scores[at : at + piece.num_tokens])
            kept.append({position: rows[at + position - piece.start].clone() for position in positions})
        return found, kept

    def _run_rows(self, rows: Sequence[Row[_Slots]], levels: Levels[_Slots]) -> None:
        """Run pieces of one start and length as a batch, each on a cache of its own path."""
        parts = [Section(self._path_pieces(row.piece), [row.piece]) for row in rows]
        slots = [self._prepare(part, row.state) for part, row in zip(parts, rows, strict=True)]
        began = perf_counter()
        start = rows[0].piece.start
        token_ids = torch.stack([self._tokens(row.piece) for row in rows])
        cache = DynamicCache()
        for number in range(len(slots[0].cache.layers) if start else 0):
            layers = [each.cache.layers[number] for each in slots]
            cache.update(
                torch.cat([layer.keys for layer in layers]), torch.cat([layer.values for layer in layers]), number
            )
        logits = self._runner.batched(token_ids, start, cache)
        results = []
        for at, (row, part) in enumerate(zip(rows, parts, strict=True)):
            with torch.no_grad():
                for number, layer in enumerate(cache.layers):
                    new = (layer.keys[at : at + 1, :, start:], layer.values[at : at + 1, :, start:])
                    slots[at].cache.update(*new, number)
            before = row.state
            self._ends = {} if before is None or before.last is None else {before.pieces[-1].segment: before.last}
            results.append(self._take_out(part, logits[at], token_ids[at], [self._wanted(row.piece)]))
        seconds = (perf_counter() - began) / len(rows)
        for row, part, own, (scores, found) in zip(rows, parts, slots, results, strict=True):
            self._finish(part, own, scores, found, seconds, "batched")
            own.last = found[0].get(row.piece.end - 1)
            levels.done(row, own)

    def _path_pieces(self, piece: Piece) -> list[Piece]:
        """Return all that stands before a piece."""
        pieces, number, end = [], piece.segment, piece.start
        while number >= 0:
            segment = self._segments[number]
            if segment.start < end:
                pieces.append(Piece(number, segment.start, end))
            number, end = segment.parent, segment.start
        return pieces[::-1]

    # What comes out

    def _keep(self, section: Section, rows: Sequence[dict[int, torch.Tensor]]) -> None:
        for piece, found in zip(section.new, rows, strict=True):
            segment = self._segments[piece.segment]
            last = found.get(piece.end - 1)
            if last is None:
                continue
            self._ends[piece.segment] = last
            if piece.end == segment.end and self._want_logits and segment.ends:
                if torch.isnan(last).any():
                    raise NonFiniteError("the logits hold NaN", "check the model's weights and dtype")
                for prompt in segment.ends:
                    self.logits[prompt] = last.clone()  # each its own: callers may change theirs

    def _write(
        self,
        section: Section,
        slots: _Slots,
        rows: Sequence[dict[int, torch.Tensor]],
        compute_s_per_token: float,
        way: str,
    ) -> None:
        extender = self._extender
        extender.cost.sized(bytes_per_token(extender.layout))
        provenance = {
            "promptdb": __version__,
            **self._runner.provenance(),
            "way": way or ("plain" if section.is_chain else "packed"),
            "past_tokens": section.num_past,
            "pass_tokens": section.num_new,
        }
        slot, source = section.num_past, KvSource(slots.cache, section.num_past)
        with extender.storer.together():
            for piece, found in zip(section.new, rows, strict=True):
                segment = self._segments[piece.segment]
                new = max(piece.start, segment.stored)
                extender.storer.store(
                    self._root,
                    self._branches[segment.prompt].packed[: piece.end * TOKEN_BYTES],
                    self._spans(piece),
                    source,
                    self.scores[piece.segment][new - segment.stored : piece.end - segment.stored],
                    found,
                    compute_s_per_token=compute_s_per_token,
                    provenance=provenance,
                    shift=slot - piece.start,
                )
                slot += piece.num_tokens
