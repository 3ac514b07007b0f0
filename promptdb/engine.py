"""Engine: a model, its tokenizer and a store. Looks up, loads, computes what is missing, and stores it."""

from __future__ import annotations

import logging
import os
import threading
from time import perf_counter
from types import TracebackType
from typing import Any

import torch

from promptdb.cache import PromptCache, bytes_per_token, layout_of
from promptdb.cost import CostModel
from promptdb.db import PromptDB
from promptdb.errors import CorruptDataError, InputTypeError, NonFiniteError, StoreError, UnsupportedModelError
from promptdb.explain import Explanation, explain
from promptdb.format import Layout
from promptdb.keys import Root, unpack_tokens
from promptdb.loader import Loader
from promptdb.representation import Representation
from promptdb.runner import Runner, token_logprobs
from promptdb.snapshot import Match
from promptdb.storer import Storer
from promptdb.tokenizer_identity import tokenizer_id
from promptdb.tokens import Encoder, Prompt, as_prompt
from promptdb.trie import cut
from promptdb.version import __version__
from promptdb.watch import ModelWatch

logger = logging.getLogger("promptdb")

# Room that a loaded cache has beyond its tokens, so that the first tokens appended do not move it.
_SPARE_TOKENS = 64


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
    write_behind : commit in a background thread; otherwise :meth:`get` returns when its spans are durable.

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
        write_behind: bool = True,
        known_weights_id: str | None = None,
    ) -> None:
        if not isinstance(db, PromptDB):
            raise InputTypeError(
                f"db must be a PromptDB, not {type(db).__name__}", "Engine(PromptDB(path), model, tokenizer)"
            )
        self.db = db
        self.model = model
        self.tokenizer = tokenizer
        self.namespace = namespace
        self.strict = strict
        self.encoder = Encoder(tokenizer)
        self.tokenizer_id = tokenizer_id(tokenizer)
        self.cost = CostModel()
        self._runner = Runner(model)
        self._watch = ModelWatch(model, known_weights_id)
        self._root: Root | None = None
        self._layout: Layout = ()
        self._lock = threading.RLock()
        self._loader = Loader(db, lambda: self._runner.device)
        self._storer = Storer(db, write_behind=write_behind)
        # The cache of the last computation: its representation is likely to be asked for it next.
        self._recent: tuple[Root, bytes, PromptCache] | None = None
        self._closed = False
        self.root  # noqa: B018 - identify, and register, before anything is computed

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
        root = self._root
        if root is None or root.weights_id != weights_id:
            if root is not None:
                self._runner = Runner(self.model)
                self._layout = ()
            root = Root(weights_id, self.tokenizer_id, self.namespace)
            self._register(root)
            self._root = root
        return root

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self._runner.device

    @property
    def max_tokens(self) -> int | None:
        """Longest prompt that the model computes exactly, in tokens, or None."""
        return self._runner.max_tokens

    def _register(self, root: Root) -> None:
        registry = self.db.registry
        known = registry.model(root.weights_id)
        self.cost = CostModel(known)
        if self._runner.needs_probe and not (known or {}).get("probe_passed"):
            difference = self._runner.probe()
            if not difference <= self._runner.probe_tolerance():
                raise UnsupportedModelError(
                    f"{self._runner.model_type} models are not supported: extending a prefix changes the logits by "
                    f"{difference:.1e} of the largest",
                    "the architecture's cache or mask depends on more than the tokens before",
                )
        if self.db.readonly:
            return
        registry.add_model(root.weights_id, {**self._describe(), "probe_passed": True})
        registry.add_tokenizer(
            root.tokenizer_id, {**self.encoder.registry_fields(), "name": type(self.tokenizer).__name__}
        )

    def _describe(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "model_type": config.model_type,
            "name": str(getattr(config, "_name_or_path", "") or type(self.model).__name__),
            "num_layers": int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0),
            "num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "max_tokens": self._runner.max_tokens or 0,
        }

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
        return self._lookup(self.root, self.tokenize(prompt).packed)

    def explain(self, prompt: Any) -> Explanation:
        """Return why a prompt is stored or not, where it parts from the nearest one, and what loading would cost."""
        packed = self.tokenize(prompt).packed
        self._lookup(self.root, packed)  # waits for what is being written of it
        return explain(self.db, self.root, packed, self.cost)

    def _lookup(self, root: Root, packed: bytes) -> Match:
        match = self._match(root, packed)
        waited = not match.is_complete and self._storer.queue.wait_for(
            root, packed, match.num_tokens, has_logits=match.has_logits
        )
        if waited:
            match = self._match(root, packed)
        return self._strictly(match) if self.strict else match

    def _match(self, root: Root, packed: bytes) -> Match:
        try:
            with self.db.read() as snapshot:
                return snapshot.match(root, packed)
        except CorruptDataError as error:
            # Only the whole store can be put right, which is not a lookup's business.
            logger.warning("the index is damaged, so nothing is found and nothing stored: %s", error)
            return Match(root, packed, (), 0, has_logits=False, is_damaged=True)

    def _strictly(self, match: Match) -> Match:
        here = self._runner.provenance()
        with self.db.read() as snapshot:
            for number, step in enumerate(match.steps):
                try:
                    record = snapshot.record(step.node)
                except CorruptDataError:
                    record = None
                same = record is not None and record.provenance.get("past_tokens") == 0
                if record is None or not same or any(record.provenance.get(name) != here[name] for name in here):
                    return Match(match.root, match.packed, match.steps[:number], step.start, has_logits=False)
        return match

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
        asked = self.tokenize(prompt)
        self._storer.queue.raise_failures()
        root = self.root
        if logits == "last":
            match = self._lookup(root, asked.packed)
            found = self._hit(match, began) if match.is_complete else None
            if found is not None:
                return found
        with self._lock:
            # Another thread may have computed it while this one waited.
            match = self._lookup(root, asked.packed)
            if match.is_complete and logits == "last":
                found = self._hit(match, began)
                if found is not None:
                    return found
                match = self._lookup(root, asked.packed)
            return self._extend(root, asked, match, keep_all=logits == "all", store=store, began=began)

    def put(self, prompt: Any) -> Representation:
        """Make sure that a prompt is stored, durably, and return its representation. See :meth:`get`."""
        representation = self.get(prompt)
        self.flush()
        return representation

    # Computing

    def _extend(
        self,
        root: Root,
        asked: Prompt,
        match: Match,
        *,
        keep_all: bool,
        store: bool,
        began: float,
        retry: bool = True,
    ) -> Representation:
        runner = self._runner
        runner.check_state()
        total = asked.num_tokens
        token_ids = torch.tensor(unpack_tokens(asked.packed), dtype=torch.int64)
        runner.check_prompt(token_ids)
        looked_up = perf_counter()
        # The log-probability of the first computed token needs the logits after the token before it. Where those are
        # not stored, and where a full hit lacks its last logits, one token is computed again.
        before = self._loader.logits(match) if match.num_tokens < total else None
        start = match.num_tokens if before is not None else max(0, match.num_tokens - 1)
        if keep_all or not self.cost.estimate(start).load_wins:
            start = 0
        cache = PromptCache(total + _SPARE_TOKENS)
        if self._layout:  # known from the last computation: one tensor per group of layers instead of two per layer
            cache = PromptCache.of_layout(self._layout, 0, total + _SPARE_TOKENS, runner.device)
        logprobs = torch.full((total,), float("nan"))
        if start:
            loaded = self._loader.prefix(match, start, total + _SPARE_TOKENS, self.cost)
            if loaded is None:  # gone between lookup and load, or damaged: a miss
                match = (
                    self._lookup(root, asked.packed) if retry else Match(root, asked.packed, (), 0, has_logits=False)
                )
                return self._extend(root, asked, match, keep_all=keep_all, store=store, began=began, retry=False)
            cache = loaded[0]
            logprobs[: match.num_tokens] = loaded[1]
            if before is not None:
                logprobs[match.num_tokens] = token_logprobs(before[None], token_ids[match.num_tokens, None])[0]
        load_s = perf_counter() - looked_up

        computing = perf_counter()
        spans = cut(match.num_tokens, total, asked.boundaries, self.db.chunk_tokens) if match.num_tokens < total else []
        # Logits at the ends of spans, and where this prompt parts from a stored one: the next branch starts there.
        wanted = {end - 1 for _, end in spans} | {total - 1, match.num_tokens - 1}
        result = runner.extend(token_ids, cache, start, {at for at in wanted if at >= start}, keep_all=keep_all)
        logprobs[start + 1 :] = result.logprobs
        if torch.isnan(logprobs[1:]).any():
            raise NonFiniteError(
                "the log-probabilities hold NaN; nothing was stored", "check the model's weights and dtype"
            )
        compute_s = perf_counter() - computing
        self.cost.computed(total - start, compute_s)

        storing = perf_counter()
        self._layout = layout = layout_of(cache)
        if store and not self.db.readonly and not match.is_damaged:
            self.cost.sized(bytes_per_token(layout))
            self._storer.store(
                root,
                asked.packed,
                spans,
                cache,
                logprobs,
                result.logits,
                compute_s_per_token=compute_s / (total - start),
                provenance={
                    "promptdb": __version__,
                    **runner.provenance(),
                    "past_tokens": start,
                    "pass_tokens": total - start,
                },
            )
        self._recent = (root, asked.packed, cache)
        return Representation(
            token_ids=tuple(unpack_tokens(asked.packed)),
            logits=result.logits[total - 1] if result.all_logits is None else result.all_logits,
            token_logprobs=logprobs[1:],
            tokens_loaded=start,
            tokens_computed=total - start,
            lookup_s=looked_up - began,
            load_s=load_s,
            compute_s=compute_s,
            store_s=perf_counter() - storing,
            _fetch=lambda num_tokens: self._fetch(root, asked.packed, num_tokens),
        )

    def _hit(self, match: Match, began: float) -> Representation | None:
        """Return the representation of a full hit, or None if it is gone or damaged."""
        looked_up = perf_counter()
        found = self._loader.complete(match)
        if found is None:
            return None
        return Representation(
            token_ids=tuple(unpack_tokens(match.packed)),
            logits=found[0],
            token_logprobs=found[1][1:],
            tokens_loaded=match.num_tokens,
            tokens_computed=0,
            lookup_s=looked_up - began,
            load_s=perf_counter() - looked_up,
            _fetch=lambda num_tokens: self._fetch(match.root, match.packed, num_tokens),
        )

    def _fetch(self, root: Root, packed: bytes, num_tokens: int | None, spare: int = _SPARE_TOKENS) -> PromptCache:
        total = len(packed) // 4
        wanted = total if num_tokens is None else num_tokens
        if not 0 <= wanted <= total:
            raise InputTypeError(f"num_tokens is {num_tokens}; the prompt has {total}")
        if wanted == 0:
            return PromptCache(spare)
        recent = self._recent
        if recent is not None and recent[0] == root and recent[1] == packed:
            with self._lock:
                return recent[2].copy(wanted, wanted + spare)
        for _ in range(3):
            match = self._lookup(root, packed)
            if match.num_tokens >= wanted:
                loaded = self._loader.prefix(match, wanted, wanted + spare, self.cost)
                if loaded is not None:
                    return loaded[0]
            if root != self.root:
                raise StoreError("these keys and values are no longer stored, and the model has changed since")
            with self._lock:
                self._extend(
                    root, Prompt(packed), self._lookup(root, packed), keep_all=False, store=True, began=perf_counter()
                )
                recent = self._recent
                if recent is not None and recent[0] == root and recent[1] == packed:
                    return recent[2].copy(wanted, wanted + spare)
        raise StoreError("these keys and values vanish from the store as fast as they are computed")

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

        return generate(self, prompt, hf_kwargs)

    # Ending

    def flush(self) -> None:
        """Wait until everything computed so far is durable.

        Raises
        ------
        WriteBehindError
            A background write failed.
        """
        self._storer.queue.flush()
        measured, self.cost.measured = self.cost.measured, {}
        if measured and not self.db.readonly and self._root is not None:
            self.db.registry.update_rates(self._root.weights_id, **measured)

    def close(self) -> None:
        """Flush and stop the writer. The store stays open: it belongs to whoever opened it."""
        if self._closed:
            return
        self._closed = True
        self._recent = None
        try:
            self.flush()
        finally:
            self._storer.queue.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
