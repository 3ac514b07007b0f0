"""Is a model computed exactly in steps, and which ways to run a tree of prompts give what one prompt at a time gives?

A position, mask or cache that an architecture reads in another way is silent otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers.cache_utils import DynamicCache

from promptdb.cache import PromptCache, layout_of
from promptdb.runner import Runner

_TOKENS = 24
# More than the windows of architectures that do not tell theirs.
_STRANGERS = 1024
# Two branches after a trunk, the first of which has two branches again: parent and tokens of each segment.
_TREE = ((-1, 9), (0, 5), (1, 3), (1, 4), (0, 3))

WAYS = ("packed", "batched")
# To be raised when the probe finds more than it did: what passed before is tried again.
PROBE_VERSION = 2

# Logits by the tokens of the tree that they stand after.
_Rows = list[tuple[list[int], torch.Tensor]]


@dataclass(frozen=True)
class Probe:
    """Largest differences from plain forward passes, relative to the largest logit.

    Attributes
    ----------
    steps : of a prompt computed in three steps; NaN if the model's logits are not finite.
    ways : of a tree of prompts, by way; infinite where the way does not work at all.
    tolerance : what counts as equal: rounding, and no more.
    """

    steps: float
    ways: dict[str, float]
    tolerance: float

    @property
    def exact_ways(self) -> frozenset[str]:
        """The ways that may be used."""
        return frozenset(way for way, difference in self.ways.items() if difference <= self.tolerance)


@torch.no_grad()
def probe(runner: Runner) -> Probe:
    """Try a model on a few tokens.

    Notes
    -----
    Cost: about ten forward passes of 24 tokens. Not thread safe, as models are not.
    """
    difference, tolerance = steps(runner)
    if math.isnan(difference) or difference > tolerance:
        return Probe(difference, {}, tolerance)
    ways = {way: _difference(runner, run) for way, run in (("packed", _packed), ("batched", _batched))}
    return Probe(difference, ways, tolerance)


@torch.no_grad()
def steps(runner: Runner, around: Collection[int] = ()) -> tuple[float, float]:
    """Compare a plain pass, which is given nothing but the tokens, with the same tokens in several steps.

    Parameters
    ----------
    around : positions after which something else happens than before: there are steps there, too.

    Returns
    -------
    tuple
        The largest difference relative to the largest logit, NaN if they are not finite; and what counts as equal.
    """
    tolerance = 1e-4 if runner.model.dtype in (torch.float32, torch.float64) else 5e-2
    places = [0, *around]
    count = min(_TOKENS + max(places), runner.max_tokens or _TOKENS + max(places))
    token_ids = _random_tokens(runner, count)
    plain = _plain(runner, token_ids)
    # The step that meets a place, and two that find behind them what it made.
    cuts = {place + after for place in places for after in (_TOKENS // 3, 2 * _TOKENS // 3)}
    cache, rows = PromptCache(count), []
    for start, end in pairwise(sorted({0, count} | {cut for cut in cuts if cut < count})):
        found = runner.extend(token_ids[:end], cache, start, set(), keep_all=True)
        rows.append(torch.as_tensor(found.all_logits))
    return _distance(torch.cat(rows), plain), tolerance


def _random_tokens(runner: Runner, count: int) -> torch.Tensor:
    return torch.randint(0, runner.vocabulary, (count,), generator=torch.Generator().manual_seed(0))


def _plain(runner: Runner, token_ids: torch.Tensor) -> torch.Tensor:
    with runner.alone():
        logits: torch.Tensor = runner.model(input_ids=token_ids[None].to(runner.device), use_cache=False).logits[0]
    return logits.float()


def _distance(logits: torch.Tensor, plain: torch.Tensor) -> float:
    return float((logits.float() - plain).abs().max() / plain.abs().max().clamp_min(1e-30))


def _difference(runner: Runner, run: Callable[[Runner, torch.Tensor], _Rows]) -> float:
    """Return the largest difference of a way's logits of the tree from plain passes over its paths."""
    token_ids = _random_tokens(runner, sum(count for _, count in _TREE))
    if runner.max_tokens is not None and runner.max_tokens < len(token_ids):
        return math.inf
    paths = _paths()
    expected: dict[int, torch.Tensor] = {}
    for path in paths:
        rows = _plain(runner, token_ids[path])
        expected.update(zip(path, rows, strict=True))
    try:
        found = run(runner, token_ids)
    except (MemoryError, torch.OutOfMemoryError):
        raise  # which says nothing of the architecture
    except Exception:  # noqa: BLE001 - whatever it raises: this way is not for this architecture
        return math.inf
    differences = [_distance(logits, torch.stack([expected[token] for token in tokens])) for tokens, logits in found]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


def _paths() -> list[list[int]]:
    """Return, for each segment of the tree, the tokens from the root to its end."""
    paths: list[list[int]] = []
    first = 0
    for parent, count in _TREE:
        before = paths[parent] if parent >= 0 else []
        paths.append([*before, *range(first, first + count)])
        first += count
    return paths


def _packed(runner: Runner, token_ids: torch.Tensor) -> _Rows:
    """Run the whole tree in one sequence, and all after the trunk on top of the trunk."""
    if not runner.masks.can_build:
        raise NotImplementedError
    total = len(token_ids)
    visible, positions = torch.zeros((total, total), dtype=torch.bool), torch.zeros(total, dtype=torch.long)
    for path in _paths():
        for place, token in enumerate(path):
            visible[token, path[: place + 1]] = True
            positions[token] = place
    logits = runner.packed(token_ids, positions, visible, positions[:0], PromptCache(total))
    trunk = _TREE[0][1]
    cache = PromptCache(trunk)
    runner.extend(token_ids[:trunk], cache, 0, set())
    # Tokens of other prompts between the trunk and its branches: who goes by places in the cache and not by positions,
    # as GPT-Neo's windows do, sees something else.
    layout = layout_of(cache)
    spread = PromptCache.of_layout(layout, trunk + _STRANGERS, total + _STRANGERS, runner.device)
    for group in layout:
        for slot in group.slots:
            spread.slot(slot).zero_()
            spread.slot(slot)[:, :, :trunk] = cache.slot(slot)
    past = torch.cat((positions[:trunk], torch.zeros(_STRANGERS, dtype=torch.long)))
    seen = torch.cat((visible[trunk:, :trunk], torch.zeros((total - trunk, _STRANGERS), dtype=torch.bool)), dim=1)
    seen = torch.cat((seen, visible[trunk:, trunk:]), dim=1)
    on_past = runner.packed(token_ids[trunk:], positions[trunk:], seen, past, spread)
    return [(list(range(total)), logits), (list(range(trunk, total)), on_past)]


def _batched(runner: Runner, token_ids: torch.Tensor) -> _Rows:
    """Run the trunk twice at once, and then the first tokens of its two branches at once."""
    trunk = _TREE[0][1]
    starts = [sum(count for _, count in _TREE[:number]) for number, (parent, _) in enumerate(_TREE) if parent == 0]
    new = min(count for parent, count in _TREE if parent == 0)
    cache = DynamicCache()
    rows = runner.batched(token_ids[:trunk].repeat(2, 1), 0, cache)
    branches = torch.stack([token_ids[start : start + new] for start in starts])
    logits = runner.batched(branches, trunk, cache)
    found = [(list(range(trunk)), row) for row in rows]
    return found + [(list(range(start, start + new)), row) for start, row in zip(starts, logits, strict=True)]
