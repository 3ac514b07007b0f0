"""The store measures its own error: stored spans against a fresh computation of their prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from promptdb.ambient import plain_torch
from promptdb.cache import PromptCache
from promptdb.errors import CorruptDataError, InputTypeError
from promptdb.format import Layout, NodeRecord
from promptdb.keys import unpack_tokens
from promptdb.kv import load_scores, span_copies
from promptdb.snapshot import Match
from promptdb.staging import copy_to_device

if TYPE_CHECKING:
    from promptdb.engine import Engine


@dataclass(frozen=True)
class LayerError:
    """Largest differences of one layer's stored keys and values from those computed again, and how large they are."""

    layer: int
    keys: float
    values: float
    largest_key: float
    largest_value: float


@dataclass(frozen=True)
class Recomputed:
    """What a sample of stored spans gave when it was computed again.

    Attributes
    ----------
    num_spans, num_tokens : of the sample.
    num_skipped : spans that could not be read, or whose prefix is gone.
    layers : by layer.
    logprobs : largest difference of a token's log-probability, in nats.
    worst_node : the span with the largest difference relative to its layer's size, hex; empty without a sample.
    worst : that difference.
    tolerance : the largest one that is rounding: 1e-4 in single precision, 0.1 in half; or that of a codec, 0.1.
    kv_codec : how keys and values were stored, if approximately.
    """

    num_spans: int
    num_tokens: int
    num_skipped: int
    layers: tuple[LayerError, ...]
    logprobs: float
    worst_node: str
    worst: float
    tolerance: float
    kv_codec: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether all of the sample is what the model computes, but for rounding and the codec. NaN is not."""
        return self.worst <= self.tolerance


def recompute(engine: Engine, sample: int, *, seed: int | None = None) -> Recomputed:
    """Compute a random sample of an engine's stored spans again, each in one pass from the start of its prompt.

    Parameters
    ----------
    sample : how many spans; all of them if there are fewer.
    seed : makes the choice repeatable.

    Raises
    ------
    InputTypeError
        ``sample`` is not positive.

    Notes
    -----
    Reads every record of the store (about 100 microseconds each) and computes each sampled span's whole prompt. Nothing
    is changed. Thread safe: the engine is busy meanwhile.
    """
    if type(sample) is not int or sample < 1:
        raise InputTypeError(f"sample is {sample!r}", "give the number of spans to compute again")
    errors = _Errors()
    with engine._lock, plain_torch(engine.device):
        root = engine.root
        engine._extender.storer.queue.flush()
        chosen: list[bytes] = []
        rng, seen = random.Random(seed), 0
        for node, record in engine.db.nodes():
            if record.root != root:
                continue
            seen += 1
            if len(chosen) < sample:
                chosen.append(node)
            elif (place := rng.randrange(seen)) < sample:
                chosen[place] = node
        for node in chosen:
            _compare(engine, node, errors)
    dtype = engine.model.dtype
    is_precise = dtype in (torch.float32, torch.float64) and not engine.kv_codec
    return errors.summary(1e-4 if is_precise else 0.1, engine.kv_codec)


class _Errors:
    def __init__(self) -> None:
        self.num_spans = self.num_tokens = self.num_skipped = 0
        self.logprobs = self.worst = 0.0
        self.worst_node = b""
        # By slot: the largest difference, and the largest magnitude.
        self.slots: dict[int, tuple[float, float]] = {}

    def add(self, node: bytes, slot: int, difference: float, size: float) -> None:
        """Note a slot's largest difference in one span."""
        before = self.slots.get(slot, (0.0, 0.0))
        # NaN compares false with everything: it must not be lost.
        self.slots[slot] = (
            difference if not difference <= before[0] else before[0],
            max(before[1], size),
        )
        relative = difference / max(size, 1e-30)
        if not relative <= self.worst or not self.worst_node:
            self.worst, self.worst_node = relative, node

    def summary(self, tolerance: float, kv_codec: str) -> Recomputed:
        """Return everything, by layer."""
        nothing = (0.0, 0.0)
        numbers = sorted({slot // 2 for slot in self.slots})
        pairs = [
            (number, self.slots.get(2 * number, nothing), self.slots.get(2 * number + 1, nothing)) for number in numbers
        ]
        layers = tuple(LayerError(number, keys[0], values[0], keys[1], values[1]) for number, keys, values in pairs)
        counts = self.num_spans, self.num_tokens, self.num_skipped
        return Recomputed(*counts, layers, self.logprobs, self.worst_node.hex(), self.worst, tolerance, kv_codec)


def _compare(engine: Engine, node: bytes, errors: _Errors) -> None:
    stored = _read(engine, node)
    if stored is None:
        errors.num_skipped += 1
        return
    record, match, cache, logprobs = stored
    runner = engine._extender.runner
    token_ids = torch.tensor(unpack_tokens(match.packed), dtype=torch.int64)
    fresh = PromptCache(record.end)
    result = runner.extend(token_ids, fresh, 0, set())
    for group in record.layout:
        for slot in group.slots:
            ours = cache.slot(slot)[0].double()
            again = fresh.slot(slot)[0, :, record.start : record.end].cpu().double()
            errors.add(node, slot, float((ours - again).abs().max()), float(again.abs().max()))
    again_logprobs = result.scores.logprobs[max(record.start - 1, 0) :]
    difference = float((logprobs[-len(again_logprobs) :] - again_logprobs).abs().max()) if len(again_logprobs) else 0.0
    errors.logprobs = difference if not difference <= errors.logprobs else errors.logprobs
    errors.num_spans += 1
    errors.num_tokens += record.num_tokens


def _read(engine: Engine, node: bytes) -> tuple[NodeRecord, Match, PromptCache, torch.Tensor] | None:
    """Return a span's record, the match of its prompt, its keys and values, and its log-probabilities."""
    cpu = torch.device("cpu")
    try:
        with engine.db.read() as snapshot:
            record = snapshot.record(node)
            prefix = engine.db.prefix(snapshot, record) if record is not None else None
            if record is None or prefix is None:
                return None
            match = snapshot.match(record.root, prefix)
            if match.num_tokens != record.end or match.steps[-1].node != node:
                return None
            layout: Layout = record.layout
            cache = PromptCache.of_layout(layout, record.num_tokens, record.num_tokens, cpu)
            stacks = cache.stacks(layout) or []
            copies = span_copies(snapshot, match, record.start, record.end, layout, stacks, 0)
            scores = load_scores(snapshot, match, record.end)
            if copies is None or scores is None:
                return None
            copy_to_device(copies, cpu)
            return record, match, cache, scores.logprobs[record.start :]
    except CorruptDataError:
        return None
