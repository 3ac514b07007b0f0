"""Engine: a model, its tokenizer and a store. Looks up, loads, computes what is missing, and stores it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from types import TracebackType
from typing import Any

import torch

from promptdb import batch, scoring
from promptdb.adoption import Untouched
from promptdb.ambient import plain_torch
from promptdb.batch import BatchLimits, Progress, Result
from promptdb.cache import PromptCache
from promptdb.db import PromptDB
from promptdb.errors import InputTypeError, ModelError, ReadOnlyStoreError, StoreError, UnsupportedModelError
from promptdb.explain import Explanation, explain
from promptdb.extender import Extender, Fetch, nothing_found
from promptdb.forecast import Forecast
from promptdb.interventions import Intervention, exact_id
from promptdb.keys import KV_CODECS, Root
from promptdb.registration import register
from promptdb.representation import Representation
from promptdb.runner import Runner
from promptdb.scoring import Classification, Score
from promptdb.served import Served
from promptdb.snapshot import Match
from promptdb.tokenizer_identity import tokenizer_id
from promptdb.tokens import Encoder, Prompt, as_prompt
from promptdb.watch import ModelWatch

# A span may vanish, or the model change, between lookup and use; who loses so often has another problem.
_ATTEMPTS = 3


class Engine:
    """Computes representations of prompts, each distinct span once, ever.

    Parameters
    ----------
    db : the store.
    model : a Hugging Face decoder in eval mode on one device. It is not changed.
    tokenizer : the model's tokenizer (transformers or ``tokenizers.Tokenizer``).
    namespace : a tenant's salt; nothing is shared between namespaces.
    strict : reuse only what was computed with these library versions, on this kind of device, with this attention
        implementation, and in one pass from the start of its prompt. bf16 and fp16 results depend on all of those.
    kv_codec : ``"int8"``: keys and values are stored in 8 bits, with a scale for each head's vector of each token. They
        are approximate then, and so is all that is computed after a stored prefix; nothing is shared with exact ones.
        ``verify --recompute`` measures how far off they are. By default they are stored as they were computed.
    write_behind : commit in a background thread; otherwise :meth:`get` returns when its spans are durable.
    intervention : hooks that every pass goes through; what they make of a prompt is never mixed with the plain model's.

    Raises
    ------
    UnsupportedModelError, TrainModeError, ModelPlacementError
        The model cannot be used exactly; nothing is stored.
    IdentityError
        The model or tokenizer cannot be identified by content.
    WriteBehindError
        From any later call: a background write failed.

    Notes
    -----
    A context manager; leaving it waits until everything is durable. :meth:`get` may be called from several threads:
    full hits run side by side, computations one after the other. The model is identified once, at the speed of memory,
    and watched for changes at every call (see :class:`promptdb.watch.ModelWatch` for the limits).
    """

    def __init__(
        self,
        db: PromptDB,
        model: Any,
        tokenizer: Any,
        *,
        namespace: str = "",
        strict: bool = False,
        kv_codec: str = "",
        write_behind: bool = True,
        known_weights_id: str | None = None,
        intervention: Intervention | None = None,
    ) -> None:
        if not isinstance(db, PromptDB):
            raise InputTypeError(
                f"db must be a PromptDB, not {type(db).__name__}", "Engine(PromptDB(path), model, tokenizer)"
            )
        if kv_codec not in KV_CODECS:
            raise InputTypeError(f"kv_codec is {kv_codec!r}", 'choose "int8", or leave it out')
        if kv_codec and strict:
            raise InputTypeError("a strict engine stores nothing approximately", "leave strict or kv_codec out")
        self.db = db
        self.kv_codec = kv_codec
        self.model = model
        self.tokenizer = tokenizer
        self.namespace = namespace
        self.strict = strict
        self.intervention = intervention
        self.encoder = Encoder(tokenizer)
        self.tokenizer_id = tokenizer_id(tokenizer)
        self._extender = Extender(db, Runner(model), strict=strict, write_behind=write_behind)
        self._watch = ModelWatch(model, known_weights_id)
        self._untouched = self._untouched_tokens(write_behind)
        self._root: Root | None = None
        self._lock = threading.RLock()
        self._num_computed = 0
        self._closed = False
        self.root  # noqa: B018 - identify, and register, before anything is computed

    def _untouched_tokens(self, write_behind: bool) -> Untouched | None:
        if self.intervention is None or self.strict or self.db.readonly:
            return None

        def plain() -> Engine:
            return Engine(
                self.db,
                self.model,
                self.tokenizer,
                namespace=self.namespace,
                kv_codec=self.kv_codec,
                write_behind=write_behind,
                known_weights_id=self.root.weights_id,
            )

        return Untouched(self.db, self.intervention.untouched_tokens, plain)

    @classmethod
    def from_pretrained(
        cls,
        db: PromptDB,
        path_or_hub_id: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        **options: Any,
    ) -> Engine:
        """Load a checkpoint and its tokenizer, and return their engine.

        Parameters
        ----------
        path_or_hub_id : directory of a checkpoint, or an ID on the Hugging Face hub.
        dtype : ``"auto"`` for the checkpoint's own, or a torch dtype or its name.
        device : by default CUDA if there is a device, else the CPU.
        **options : those of :class:`Engine`.

        Raises
        ------
        ModelNotFoundError
            There is no such checkpoint, or no tokenizer beside it.
        ModelError
            transformers cannot load it; its reason is part of the message.
        InputTypeError, ModelPlacementError
            There is no such dtype or device. Nothing has been read then.

        Notes
        -----
        The IDs of a checkpoint are remembered in the store by the identity of its files: the second time, an unchanged
        checkpoint is not hashed.
        """
        from promptdb.loading import load_checkpoint

        loaded = load_checkpoint(db, path_or_hub_id, dtype=dtype, device=device)
        engine = cls(db, loaded.model, loaded.tokenizer, known_weights_id=loaded.known_weights_id, **options)
        loaded.remember(db, engine.root.weights_id, engine.tokenizer_id)
        return engine

    # What the engine is

    @property
    def root(self) -> Root:
        """The identity that representations are stored under now. Follows changes of the model."""
        weights_id = self._watch.weights_id
        intervention_id = "" if self.intervention is None else self.intervention.id
        root = self._root
        if root is None or (root.weights_id, root.intervention_id) != (weights_id, intervention_id):
            if root is not None:
                self._extender.replace_runner(Runner(self.model))
            root = Root(weights_id, self.tokenizer_id, self.namespace, intervention_id, self.kv_codec)
            name = type(self.tokenizer).__name__
            self._extender.cost = register(self.db, root, self._extender.runner, self.encoder, name)
            if self.intervention is not None:
                with plain_torch(self.device):
                    self.intervention.attach_to(self._extender.runner)
            self._root = root
        return root

    @property
    def is_causal(self) -> bool:
        """Whether a token's results depend on those before it only, as they do without an intervention."""
        return self.intervention is None or self.intervention.causal

    def root_of(self, packed: bytes) -> Root:
        """Return the identity that a prompt, as packed tokens, is stored under now: :attr:`root`, if it is causal."""
        root = self.root
        return root if self.is_causal else replace(root, intervention_id=exact_id(root.intervention_id, packed))

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self._extender.runner.device

    @property
    def max_tokens(self) -> int | None:
        """Longest prompt that the model computes exactly, in tokens, or None."""
        return self._extender.runner.max_tokens

    def tokenize(self, prompt: Any) -> Prompt:
        """Return a prompt's tokens and the boundaries of its pieces.

        Parameters
        ----------
        prompt : text, a list of pieces of text, a ``Text``, or token IDs (sequence of int, array, 1-D tensor).
        """
        return as_prompt(prompt, self.encoder)

    # Reading

    def lookup(self, prompt: Any) -> Match:
        """Find what is stored of a prompt. Never computes, never writes. See :meth:`PromptDB.lookup`."""
        self._check_open()
        packed = self.tokenize(prompt).packed
        return self._extender.match(self.root_of(packed), packed, use_held=False)

    def explain(self, prompt: Any) -> Explanation:
        """Return why a prompt is stored or not, where it parts from the nearest one, and what loading would cost."""
        self._check_open()
        packed = self.tokenize(prompt).packed
        root = self.root_of(packed)
        usable = self._extender.match(root, packed, use_held=False)  # waits for what is being written of it
        return explain(self.db, root, packed, self._extender.cost, usable if self.strict else None)

    def get(self, prompt: Any, *, logits: str = "last", store: bool = True) -> Representation:
        """Return the representation of a prompt: loaded as far as it is stored, computed from there, and stored.

        Parameters
        ----------
        prompt : text, a list of pieces (spans are cut at their ends), a ``Text``, or n token IDs.
        logits : ``"last"``, or ``"all"`` for those after every token. All are never stored: the whole prompt is
            computed.
        store : keep what was computed.

        Returns
        -------
        Representation

        Raises
        ------
        EmptyPromptError, PromptTooLongError, TokenRangeError, TextEncodingError, InputTypeError
            The prompt cannot be used.
        TrainModeError, ModelPlacementError, IdentityError
            The model changed into something that cannot be used.
        NonFiniteError
            The result holds NaN or infinity. Nothing was stored.
        WriteBehindError
            An earlier background write failed.

        Notes
        -----
        A full hit runs no forward pass and reads no keys or values. Damaged spans are removed, reported to the log, and
        computed again.
        """
        if logits not in ("last", "all"):
            raise InputTypeError(f"logits is {logits!r}", 'choose "last" or "all"')
        began = perf_counter()
        self._check_open()
        keep_all = logits == "all"
        with plain_torch(self.device):
            asked = self.tokenize(prompt)
            self._extender.storer.queue.raise_failures()
            computed = self._num_computed
            match = self._extender.match(self.root_of(asked.packed), asked.packed)
            self._extender.runner.check_mode()
            if not match.is_complete and not keep_all and self._extender.pull(match.root, [asked], store=store):
                match = self._extender.match(match.root, asked.packed)
            shared = 0
            if not match.is_complete and not keep_all:
                (shared,) = self.share_untouched(match.root, [asked], store=store)
                if shared or self.intervention is not None:
                    match = self._extender.match(match.root, asked.packed)
            found = None if keep_all else self._hit(match, asked, began, store=store)
            if found is None:
                with self._lock:
                    # Another thread may have computed it while this one waited.
                    known = match if computed == self._num_computed and not match.is_complete else None
                    try:
                        found = self._compute(known, asked, began, keep_all=keep_all, store=store)
                    except BaseException:
                        self._extender.give_up()
                        raise
        shared = min(shared, found.tokens_loaded)
        if shared:
            found = replace(
                found, tokens_loaded=found.tokens_loaded - shared, tokens_computed=found.tokens_computed + shared
            )
        self.db.count_served(
            match.root.weights_id,
            Served(
                num_prompts=1,
                num_complete=int(not found.tokens_computed),
                tokens_loaded=found.tokens_loaded,
                tokens_computed=found.tokens_computed - shared,  # which the plain engine counts
                load_s=found.lookup_s + found.load_s,
                compute_s=found.compute_s,
            ),
        )
        return found

    def _hit(self, match: Match, asked: Prompt, began: float, *, store: bool) -> Representation | None:
        return self._extender.hit(match, self._fetcher(match.root, asked, store=store), began, store=store)

    def _compute(
        self, known: Match | None, asked: Prompt, began: float, *, keep_all: bool, store: bool
    ) -> Representation:
        """Compute what is missing. Holds the lock. ``known`` is what is stored of the prompt, if that was just seen."""
        self._num_computed += 1
        for attempt in range(_ATTEMPTS):
            match = known
            if match is None:
                match = self._extender.match(self.root_of(asked.packed), asked.packed)
                found = None if keep_all else self._hit(match, asked, began, store=store)
                if found is not None:
                    return found
            root, known = match.root, None
            if attempt == _ATTEMPTS - 1:  # whatever is wrong with what is stored: do without
                match = nothing_found(root, asked.packed)
            extended = self._extender.extend(
                asked,
                match,
                self._fetcher(root, asked, store=store),
                keep_all=keep_all,
                store=store,
                began=began,
                still_valid=lambda expected=root: self.root_of(asked.packed) == expected,  # type: ignore[misc]
            )
            if extended is not None:
                return extended
        raise ModelError("the model's weights change while they are used", "change them between calls")

    def _fetcher(self, root: Root, asked: Prompt, *, store: bool) -> Fetch:
        return lambda num_tokens: self._fetch(root, asked, num_tokens, store=store)

    def _fetch(self, root: Root, asked: Prompt, num_tokens: int | None, *, store: bool) -> PromptCache:
        total = asked.num_tokens
        wanted = total if num_tokens is None else num_tokens
        if type(wanted) is not int or not 0 <= wanted <= total:
            raise InputTypeError(f"num_tokens is {num_tokens!r}", f"the prompt has {total} tokens")
        self._check_open()
        with plain_torch(self.device):
            cache = self._extender.cache_of(self._extender.match(root, asked.packed), wanted)
            if cache is not None:
                return cache
            with self._lock:
                for _ in range(_ATTEMPTS):
                    if root != self.root_of(asked.packed):
                        raise StoreError("these keys and values are not stored any more, and the model has changed")
                    match = self._extender.match(root, asked.packed)
                    cache = self._extender.cache_of(match, wanted)
                    if cache is not None:
                        return cache
                    self._extender.extend(
                        asked,
                        match,
                        self._fetcher(root, asked, store=store),
                        keep_all=False,
                        store=store,
                        began=perf_counter(),
                        still_valid=lambda: self.root_of(asked.packed) == root,
                    )
        raise StoreError("these keys and values vanish from the store as fast as they are computed")

    def put(self, prompt: Any) -> Representation:
        """Make sure that a prompt is stored, durably, and return its representation. See :meth:`get`.

        Raises
        ------
        ReadOnlyStoreError
            It is not stored, and the store is open for reading only.
        """
        if self.db.readonly and not self.lookup(prompt).is_complete:
            raise ReadOnlyStoreError(f"{self.db.path} is open for reading only", "open it for writing, or use get()")
        representation = self.get(prompt)
        self.flush()
        return representation

    def generate(self, prompt: Any, **hf_kwargs: Any) -> Any:
        """Return what ``model.generate`` returns for a prompt, starting from its stored prefix.

        Parameters
        ----------
        prompt : as for :meth:`get`; it is stored like any other.
        **hf_kwargs : passed to ``model.generate``, but for ``input_ids``, ``attention_mask`` and ``past_key_values``.

        Returns
        -------
        torch.Tensor or ModelOutput
            As from ``model.generate``: prompt and continuation, ``[sequences, tokens]``.

        Notes
        -----
        Options under which ``generate`` brings a cache of its own run untouched, from the start of the prompt.
        """
        from promptdb.generation import generate

        self._check_causal("generate")
        return generate(self, prompt, hf_kwargs)

    def share_untouched(self, root: Root, prompts: Sequence[Prompt], *, store: bool) -> list[int]:
        """Let the plain model compute the first tokens of prompts that the intervention does not touch.

        Returns
        -------
        list of int
            How many tokens it computed for each prompt: 0 where they are stored, or may not be.
        """
        if self._untouched is None or not store:
            return [0] * len(prompts)
        return self._untouched.share(root, prompts)

    # Many prompts

    def run(
        self,
        prompts: Iterable[Any],
        *,
        store: bool = True,
        limits: BatchLimits | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[Representation]:
        """Yield the representation of every prompt, in order; each distinct missing token is computed once.

        Parameters
        ----------
        prompts : any iterable of what :meth:`get` takes, of any size; read as needed.
        store : keep what is computed. Without it, tokens are shared within a window only.
        limits : how much is planned, run and held at once; by default what suits the device.
        on_progress : called as tokens are loaded and computed, from the thread that takes the results.

        Raises
        ------
        As :meth:`get`. What was computed before is stored.

        Notes
        -----
        Memory is bounded by the limits, whatever the number of prompts. ``tokens_computed`` counts a shared token for
        the first prompt that has it. A strict engine takes one prompt after the other. See docs/batches.md.
        """
        results = batch.run(self, prompts, store=store, limits=limits, on_progress=on_progress)
        return (self._represent(result, store=store) for result in results)

    def plan(self, prompts: Iterable[Any], *, want_logits: bool = True, limits: BatchLimits | None = None) -> Forecast:
        """Return what :meth:`run` would do for prompts: tokens to compute, passes, bytes, time. Computes nothing.

        Parameters
        ----------
        want_logits : as :meth:`run` does; :meth:`score` does without.
        limits : as for :meth:`run`.

        Raises
        ------
        As :meth:`run`, but for what only computing shows.

        Notes
        -----
        Plans all prompts at once, where :meth:`run` goes window by window; see :func:`promptdb.forecast.forecast` for
        what that means, and for the memory that it takes. ``promptdb put --dry-run`` does it without loading a model.
        """
        self._check_open()
        self._check_causal("plan")
        self.flush()
        return batch.plan(self, prompts, want_logits=want_logits, limits=limits)

    def _represent(self, result: Result, *, store: bool) -> Representation:
        assert result.logits is not None
        return Representation(
            packed=result.asked.packed,
            logits=result.logits,
            token_logprobs=result.scores.logprobs[1:],
            greedy_ids=result.scores.greedy_ids[1:],
            tokens_loaded=result.tokens_loaded,
            tokens_computed=result.tokens_computed,
            lookup_s=result.lookup_s,
            compute_s=result.compute_s,
            _fetch=self._fetcher(result.root, result.asked, store=store),
        )

    def score(
        self,
        items: Iterable[Any],
        *,
        store: bool = True,
        limits: BatchLimits | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[Score]:
        """Yield the log-probability of every continuation given its context, in order. Otherwise as :meth:`run`.

        Parameters
        ----------
        items : pairs (context, continuation), both text (a context may also be a list of pieces, or a ``Text``) or both
            token IDs. Text is tokenised as a whole.

        Raises
        ------
        EmptyPromptError
            A context or a continuation has no tokens.

        Examples
        --------
        >>> pairs = [("The sky is", " blue"), ("The sky is", " high")]
        >>> [score.logprob for score in engine.score(pairs)]  # doctest: +SKIP
        """
        self._check_causal("score")
        return scoring.score(self, items, store=store, limits=limits, on_progress=on_progress)

    def classify(
        self,
        context: Any,
        choices: Sequence[str],
        prior: Mapping[str, float] | Sequence[float] | None = None,
        *,
        normalization: str = "none",
    ) -> Classification:
        """Return which choice continues a context best: probabilities from the log-probabilities of the choices.

        Parameters
        ----------
        context : text, or pieces of text.
        choices : k different continuations.
        prior : weights of the choices, k positive numbers or by choice; equal by default.
        normalization : divide a choice's log-probability by its number of ``"tokens"`` or ``"bytes"``, or ``"none"``.
        """
        return next(self.classify_many([context], choices, prior, normalization=normalization))

    def classify_many(
        self,
        contexts: Iterable[Any],
        choices: Sequence[str],
        prior: Mapping[str, float] | Sequence[float] | None = None,
        *,
        normalization: str = "none",
    ) -> Iterator[Classification]:
        """Yield the classification of every context, in order; see :meth:`classify` and :meth:`run`."""
        self._check_causal("classify")
        return scoring.classify(self, contexts, choices, prior=prior, normalization=normalization)

    def generate_many(self, prompts: Iterable[Any], **hf_kwargs: Any) -> Iterator[Any]:
        """Yield what ``model.generate`` returns for every prompt, in order; see :meth:`generate`.

        The prompts are computed as one tree, as by :meth:`run`; then each is continued by itself, from its stored keys
        and values, so that a prompt gives what it gives alone.
        """
        self._check_causal("generate")
        if self.db.readonly:  # nothing of a batch would be found again
            yield from (self.generate(prompt, **hf_kwargs) for prompt in prompts)
            return
        for result in self.run(prompts):
            yield self.generate(list(result.token_ids), **hf_kwargs)

    # Ending

    def flush(self) -> None:
        """Wait until everything computed so far is durable.

        Raises
        ------
        WriteBehindError
            A background write failed.
        """
        self._extender.storer.queue.flush()
        cost = self._extender.cost
        measured, cost.measured = cost.measured, {}
        if measured and not self.db.readonly and self._root is not None:
            self.db.registry.update_rates(self._root.weights_id, **measured)

    def invalidate(self) -> None:
        """Hash all weights again at the next call.

        Only needed after an edit that :class:`promptdb.watch.ModelWatch` cannot see: one through ``.data``, numpy or C
        code that touches few elements of a tensor.
        """
        self._watch.invalidate()

    def close(self) -> None:
        """Flush and stop the writer. The store stays open: it belongs to whoever opened it."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        finally:
            if self._untouched is not None:
                self._untouched.close()
            self._extender.storer.queue.close()
            self._extender.held = None
            self._watch.invalidate()  # lets go of the model's tensors

    def _check_causal(self, what: str) -> None:
        if not self.is_causal:
            raise UnsupportedModelError(
                f"{what}: under hooks that are not causal, what a token gets depends on those after it",
                "get(), put(), run() and Recorder take whole prompts",
            )

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the engine is closed", "create another one")

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
