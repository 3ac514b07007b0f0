"""Many prompts at once: every distinct missing token goes through the model once, results come back in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from promptdb.ambient import plain_torch
from promptdb.cache import bytes_per_token
from promptdb.errors import InputTypeError, ModelError, PromptError, UnsupportedModelError
from promptdb.extender import nothing_found
from promptdb.forecast import Forecast, Sizes, forecast
from promptdb.keys import Root, common_prefix
from promptdb.passes import Passes, VanishedError
from promptdb.plan import Limits
from promptdb.prefetch import Prefetch, with_next
from promptdb.scores import TokenScores
from promptdb.served import Served
from promptdb.snapshot import Match
from promptdb.tokens import Prompt
from promptdb.tree import Branch, Segment, build

if TYPE_CHECKING:
    from promptdb.engine import Engine

_ATTEMPTS = 3
# Prompts of a window wait for each other's results, and their logits wait in memory.
_WINDOW_PROMPTS = 8192
_WINDOW_BYTES = 256 << 20


@dataclass(frozen=True)
class BatchLimits:
    """How much a batch takes at once. Results do not depend on it, but for rounding.

    Attributes
    ----------
    window_tokens : new tokens of prompts that are planned together; shared ones count once if they stand beside each
        other.
    pass_tokens : tokens of several branches that go through the model at once.
    cache_bytes : keys and values in memory, the model's device included; a single longer prompt may take more.
    way : ``"packed"``, ``"batched"`` or ``"single"``; by default the first of these that is exact for the model.
    """

    window_tokens: int = 16_384
    pass_tokens: int = 512
    cache_bytes: int = 2 << 30
    way: str | None = None

    def __post_init__(self) -> None:
        sizes = {"window_tokens": self.window_tokens, "pass_tokens": self.pass_tokens, "cache_bytes": self.cache_bytes}
        for name, value in sizes.items():
            if type(value) is not int or value < 1:
                raise InputTypeError(f"{name} is {value!r}", "give a positive number")
        if self.way not in (None, "packed", "batched", "single"):
            raise InputTypeError(f"way is {self.way!r}", 'choose "packed", "batched", "single" or None')

    @classmethod
    def for_device(cls, device: torch.device) -> BatchLimits:
        """Return what keeps a device busy."""
        if device.type == "cpu":
            return cls()
        return cls(window_tokens=131_072, pass_tokens=4096, cache_bytes=8 << 30)


@dataclass(frozen=True)
class Result:
    """What a batch gives for one prompt. ``logits`` is None unless they were wanted."""

    root: Root
    asked: Prompt
    scores: TokenScores
    logits: torch.Tensor | None
    tokens_loaded: int
    tokens_computed: int
    lookup_s: float = 0.0
    compute_s: float = 0.0


@dataclass(frozen=True)
class Progress:
    """How far a batch is: tokens of finished sections and of prompts that needed none, since the last report."""

    tokens_loaded: int
    tokens_computed: int


def run(
    engine: Engine,
    prompts: Iterable[Any],
    *,
    want_logits: bool = True,
    store: bool = True,
    limits: BatchLimits | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[Result]:
    """Yield the result of every prompt, in order.

    Parameters
    ----------
    prompts : as for :meth:`Engine.get`; taken as they are needed.
    want_logits : return, and where they are computed store, the logits after the last token.
    on_progress : called after every section, while the engine is busy.

    Raises
    ------
    PromptError, InputTypeError
        Of a prompt that cannot be used, with its number; after the results of those before it.

    Notes
    -----
    The engine is free for others between windows. With a shared store, prompts are taken a window ahead, and what they
    lack is fetched while the window before them is computed. See docs/batches.md.
    """
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise InputTypeError(
            f"prompts must be an iterable of prompts, not {type(prompts).__name__}", "put it in a list"
        )
    asked = _asked(engine, prompts)
    if engine.strict or not engine.is_causal:  # only what was computed in one pass of its own counts
        for prompt in asked:
            result = _alone(engine, prompt, store=store)
            if on_progress is not None:
                on_progress(Progress(result.tokens_loaded, result.tokens_computed))
            yield result
        return
    bounds = limits or BatchLimits.for_device(engine.device)
    row_bytes = engine._extender.runner.vocabulary * 4 if want_logits else 0
    windows = _windows(asked, bounds, row_bytes)
    if engine._extender.tier is None:
        for window in windows:
            yield from _Window(engine, window, want_logits, store, bounds, on_progress).results()
        return
    prefetch = Prefetch(engine._extender)
    try:
        for window, following in with_next(windows):
            this = _Window(engine, window, want_logits, store, bounds, on_progress, prefetch, following)
            yield from this.results()
    finally:
        prefetch.close()


def plan(
    engine: Engine, prompts: Iterable[Any], *, want_logits: bool = True, limits: BatchLimits | None = None
) -> Forecast:
    """Return what :func:`run` would do; see :meth:`Engine.plan`."""
    window = _Window(engine, [], want_logits, True, limits or BatchLimits.for_device(engine.device), None)
    way = window.way()
    sizes = Sizes.of_config(engine.model.config.to_dict(), str(engine.model.dtype).removeprefix("torch."))
    asked, bounds = _asked(engine, prompts), window.pass_limits(way)
    return forecast(engine.db, engine.root, asked, sizes=sizes, limits=bounds, way=way, want_logits=want_logits)


def _asked(engine: Engine, prompts: Iterable[Any]) -> Iterator[Prompt]:
    """Yield the prompts' tokens; an error says which prompt it is about."""
    for number, prompt in enumerate(prompts, 1):
        try:
            asked = engine.tokenize(prompt)
            engine._extender.runner.check_prompt(asked.packed)
        except (PromptError, InputTypeError) as error:
            raise type(error)(f"prompt {number}: {error.message}", error.hint) from error
        yield asked


def _alone(engine: Engine, prompt: Any, *, store: bool) -> Result:
    asked = engine.tokenize(prompt)
    found = engine.get(asked, store=store)
    scores = TokenScores.unknown(asked.num_tokens)
    scores[1:] = TokenScores(found.token_logprobs, found.greedy_ids)
    counts = found.tokens_loaded, found.tokens_computed
    root = engine.root_of(asked.packed)
    return Result(root, asked, scores, found.logits, *counts, found.lookup_s, found.compute_s)


def _windows(prompts: Iterable[Prompt], limits: BatchLimits, row_bytes: int) -> Iterator[list[Prompt]]:
    window: list[Prompt] = []
    tokens = size_bytes = 0
    source = iter(prompts)
    while True:
        try:
            prompt = next(source)
        except StopIteration:
            break
        except Exception:
            # What came before has a right to its results.
            if window:
                yield window
            raise
        shared = common_prefix(window[-1].packed, prompt.packed) if window else 0
        tokens += prompt.num_tokens - shared
        size_bytes += row_bytes + 16 * prompt.num_tokens
        window.append(prompt)
        if tokens >= limits.window_tokens or size_bytes >= _WINDOW_BYTES or len(window) >= _WINDOW_PROMPTS:
            yield window
            window, tokens, size_bytes = [], 0, 0
    if window:
        yield window


def _with_computed(result: Result, extra: int) -> Result:
    loaded, computed = result.tokens_loaded - extra, result.tokens_computed + extra
    return replace(result, tokens_loaded=loaded, tokens_computed=computed) if extra else result


def _served(results: Sequence[Result]) -> Served:
    return Served(
        num_prompts=len(results),
        num_complete=sum(not each.tokens_computed for each in results),
        tokens_loaded=sum(each.tokens_loaded for each in results),
        tokens_computed=sum(each.tokens_computed for each in results),
        load_s=sum(each.lookup_s for each in results),
        compute_s=sum(each.compute_s for each in results),
    )


class _Window:
    def __init__(
        self,
        engine: Engine,
        window: Sequence[Prompt],
        want_logits: bool,
        store: bool,
        limits: BatchLimits,
        on_progress: Callable[[Progress], None] | None,
        prefetch: Prefetch | None = None,
        following: Sequence[Prompt] | None = None,
    ) -> None:
        self._prefetch, self._following = prefetch, following
        self._engine, self._prompts, self._want_logits, self._store = engine, window, want_logits, store
        self._extender = engine._extender
        self._limits, self._report = limits, on_progress or (lambda progress: None)

    def results(self) -> list[Result]:
        """Compute what is missing, and return everything."""
        engine = self._engine
        with engine._lock, plain_torch(engine.device):
            engine._check_open()
            engine._num_computed += 1
            self._extender.held = None  # its memory is needed, and what follows stands on the store
            attempts, shared = 0, [0] * len(self._prompts)
            while attempts < _ATTEMPTS:
                root = engine.root
                runner = self._extender.runner
                runner.check_mode()
                runner.check_placement()
                self._extender.storer.queue.flush()
                if not attempts:
                    if self._prefetch is not None:
                        self._pull(root, self._prefetch)
                    again = engine.share_untouched(root, self._prompts, store=self._store)
                    shared = [before + more for before, more in zip(shared, again, strict=True)]
                healed = self._extender.loader.num_healed
                try:
                    results = self._attempt(root, blindly=attempts == _ATTEMPTS - 1)
                    shared = [min(extra, each.tokens_loaded) for each, extra in zip(results, shared, strict=True)]
                    results = [_with_computed(each, extra) for each, extra in zip(results, shared, strict=True)]
                    served = _served(results)
                    served.tokens_computed -= sum(shared)  # which the plain engine counts
                    engine.db.count_served(root.weights_id, served)
                    return results
                except VanishedError:
                    # What was damaged is a miss from now on: there may be more of it.
                    attempts += self._extender.loader.num_healed == healed
                except BaseException:
                    self._extender.give_up()
                    raise
        raise ModelError("the model's weights change while they are used", "change them between calls")

    def _pull(self, root: Root, prefetch: Prefetch) -> None:
        """Fetch what is missing and was not fetched ahead, and begin with the next window."""
        extender = self._extender
        if not prefetch.finish(root, self._prompts):
            extender.fetch(root, self._prompts)
        if self._store:
            extender.settle(root, self._prompts)
        if self._following is not None:
            prefetch.begin(root, self._following)

    def _attempt(self, root: Root, *, blindly: bool) -> list[Result]:
        began = perf_counter()
        extender, loader = self._extender, self._extender.loader
        packed = [prompt.packed for prompt in self._prompts]
        matches = extender.match_all(root, packed) if not blindly else [nothing_found(root, each) for each in packed]
        healed = loader.num_healed
        read = loader.many(matches, want_logits=self._want_logits, device=extender.runner.device)
        lost = [at for at, each in enumerate(read) if each is None]
        if lost and loader.num_healed != healed:
            raise VanishedError
        for at in lost:  # gone, or damaged in a store that cannot be put right: these alone are computed as if new
            matches[at] = Match(root, packed[at], (), 0, has_logits=False)
        stored = [each or (TokenScores.unknown(0), None) for each in read]
        missing = [at for at, match in enumerate(matches) if not self._is_done(match)]
        lookup_s = perf_counter() - began
        done = sum(self._prompts[at].num_tokens for at in range(len(matches))) - sum(
            self._prompts[at].num_tokens for at in missing
        )
        if done:
            self._report(Progress(done, 0))
        branches = [
            Branch(packed[at], self._prompts[at].boundaries, matches[at].num_tokens, matches[at].has_logits)
            for at in missing
        ]
        segments = build(branches, want_logits=self._want_logits)
        is_stored = self._store and not extender.db.readonly and not any(match.is_damaged for match in matches)
        passes = Passes(
            extender,
            root,
            segments,
            branches,
            [matches[at] for at in missing],
            want_logits=self._want_logits,
            store=is_stored,
            still_valid=lambda: self._engine.root == root,
        )
        computing = perf_counter()
        way = self.way()
        passes_limits = self.pass_limits(way)
        for tokens in passes.run_levels(passes_limits) if way == "batched" else passes.run(passes_limits):
            self._report(Progress(0, tokens))
        compute_s = perf_counter() - computing
        results: list[Result] = []
        share = lookup_s / len(packed)
        for at, prompt in enumerate(self._prompts):
            scores, logits = stored[at]
            results.append(Result(root, prompt, scores, logits, prompt.num_tokens, 0, share))
        for number, segment in enumerate(segments):
            for branch in segment.ends:
                at = missing[branch]
                results[at] = self._computed(
                    root, at, branch, number, stored[at][0], passes, segments, share, compute_s
                )
        return results

    def _is_done(self, match: Match) -> bool:
        return match.is_complete or (not self._want_logits and match.num_tokens * 4 == len(match.packed))

    def way(self) -> str:
        """Return how branches run: as asked for, or the fastest that is exact.

        Raises
        ------
        UnsupportedModelError
            The way asked for is not exact for this model.
        """
        runner, asked = self._extender.runner, self._limits.way
        exact = [way for way in ("packed", "batched") if way in runner.exact_ways]
        if not runner.masks.can_build and "packed" in exact:
            exact.remove("packed")
        ways = [*exact, "single"]
        if asked is None:
            return ways[0]
        if asked not in ways:
            raise UnsupportedModelError(
                f"{runner.model_type} models are not computed exactly the {asked} way",
                f"choose one of {', '.join(ways)}",
            )
        return asked

    def pass_limits(self, way: str) -> Limits:
        """Return what a pass may take."""
        runner, layout = self._extender.runner, self._extender.layout
        config = runner.model.config.to_dict()
        told = Sizes.of_config(config, str(runner.model.dtype).removeprefix("torch.")).kv_bytes_per_token
        token_bytes = bytes_per_token(layout) if layout else told or 1 << 16
        # Two caches are alive at once: a section's, and that of the one before it. Of rows, those of all parents, their
        # own, and the batch before and after it grew.
        alive = 4 if way == "batched" else 2
        cache_tokens = max(1, self._limits.cache_bytes // (alive * token_bytes))
        return Limits(
            pass_tokens=self._limits.pass_tokens,
            chain_tokens=max(32, self._limits.pass_tokens * 3 // 8),
            cache_tokens=cache_tokens,
            max_path=runner.masks.max_tokens(),
            may_pack=way == "packed",
        )

    def _computed(
        self,
        root: Root,
        at: int,
        branch: int,
        number: int,
        stored: TokenScores,
        passes: Passes,
        segments: Sequence[Segment],
        lookup_s: float,
        compute_s: float,
    ) -> Result:
        prompt = self._prompts[at]
        scores = TokenScores.unknown(prompt.num_tokens)
        scores[: len(stored)] = stored
        computed = 0
        while number >= 0:
            segment = segments[number]
            if segment.stored < segment.end:
                scores[segment.stored : segment.end] = passes.scores[number]
            if segment.owner == branch:
                computed += passes.num_computed[number]
            number = segment.parent
        logits = passes.logits.get(branch)
        total = sum(passes.num_computed) or 1
        seconds = compute_s * computed / total
        return Result(root, prompt, scores, logits, prompt.num_tokens - computed, computed, lookup_s, seconds)
