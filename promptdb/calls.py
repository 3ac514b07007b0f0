"""Ordinary calls of a transformers model, ``model(...)`` and ``model.generate(...)``, that read and fill a store.

:func:`cached` puts a stand-in for ``forward`` on the model for as long as its block runs. A call that the store can
answer exactly is answered from it; any other reaches the model as it is.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput

from promptdb.ambient import plain_torch
from promptdb.arguments import Asked, Reader, UntouchedError, check_ambient, is_recorded
from promptdb.db import PromptDB
from promptdb.engine import Engine
from promptdb.errors import (
    IdentityError,
    InputTypeError,
    ModelError,
    NonFiniteError,
    PromptError,
    UnsupportedModelError,
)
from promptdb.events import note
from promptdb.refusals import Interception

if TYPE_CHECKING:
    from promptdb.cache import PromptCache

__all__ = ["Cached", "cached"]


# What the engine says of a model or prompt that it cannot use exactly. A store that fails is not among them.
_REFUSALS = (PromptError, ModelError, IdentityError, NonFiniteError, InputTypeError)

_installing = threading.Lock()


class Cached:
    """What :func:`cached` yields: the engine, and counts of what happened. Thread safe.

    Attributes
    ----------
    engine : the :class:`~promptdb.Engine` that answers. It may be used by itself.
    served_calls : calls of the model that were answered from the store, or filled it.
    reasons : why other calls went to the model untouched, and how many; ``"continues a cache"`` are the steps of
        ``generate`` after the first.
    tokens_loaded, tokens_computed : tokens of served calls that came from the store, and that went through the model.
    """

    def __init__(self, engine: Engine, forward: Callable[..., Any], *, last_logits: bool) -> None:
        self.engine = engine
        self.served_calls = 0
        self.reasons: Counter[str] = Counter()
        self.tokens_loaded = 0
        self.tokens_computed = 0
        self._forward = forward
        self._reader = Reader(forward, engine.model.config, last_logits=last_logits)
        self._output_class: type[ModelOutput] | None = None
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._process = os.getpid()
        self._is_over = False

    @property
    def untouched_calls(self) -> int:
        """Calls that went to the model as they were."""
        return self.reasons.total()

    def __repr__(self) -> str:
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.reasons.most_common())
        return (
            f"<Cached: {self.served_calls} calls served, {self.tokens_loaded} tokens loaded, {self.tokens_computed} "
            f"computed; {self.untouched_calls} calls untouched{f' ({reasons})' if reasons else ''}>"
        )

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the model's ``forward``."""
        if is_recorded():
            return self._forward(*args, **kwargs)
        is_ours = getattr(self._thread, "is_serving", False)  # the engine calls the model itself
        # A forked child must not use the store, nor a lock that another thread may have held.
        if is_ours or self._is_over or os.getpid() != self._process:
            return self._forward(*args, **kwargs)
        try:
            device = self.engine.device
            asked = self._reader.read(args, kwargs, device)
            check_ambient(self.engine.model, device)
            return self._serve(asked)
        except UntouchedError as reason:
            with self._lock:
                self.reasons[str(reason)] += 1
        # Here and not above: an error of the model must not carry our reason as its context.
        return self._forward(*args, **kwargs)

    def _serve(self, asked: Asked) -> Any:
        self._thread.is_serving = True
        try:
            output_class = self._output_class or self._ask_output_class(asked.rows[0][0])
            logits, caches, loaded, computed = self._get_rows(asked)
        except _REFUSALS as error:
            note("call_untouched", f"a call goes to the model untouched: {error}", reason=type(error).__name__)
            raise UntouchedError(type(error).__name__) from None
        finally:
            self._thread.is_serving = False
        cache = _joined(caches, asked.cache, self.engine.model.config) if asked.use_cache else None
        stacked = logits[0][None] if len(logits) == 1 else torch.stack(logits)
        output = output_class(logits=stacked, past_key_values=cache)
        with self._lock:
            self.served_calls += 1
            self.tokens_loaded += loaded
            self.tokens_computed += computed
        return output if asked.return_dict else output.to_tuple()

    def _get_rows(self, asked: Asked) -> tuple[list[torch.Tensor], list[PromptCache], int, int]:
        """Return logits ``[positions, vocabulary]`` and caches of all rows, and tokens loaded and computed."""
        found: dict[tuple[int, ...], tuple[torch.Tensor, PromptCache | None]] = {}
        loaded = computed = 0
        for row in asked.rows:
            if row in found:
                continue
            representation = self.engine.get(row, logits="last" if asked.is_last else "all")
            logits = representation.logits.reshape(-1, representation.logits.shape[-1])
            if 0 < asked.keep < len(logits):
                logits = logits[-asked.keep :].clone()  # a view would keep all of them in memory
            # Now and not later: the engine still holds what it has just computed.
            found[row] = logits, representation.past_key_values() if asked.use_cache else None
            loaded += representation.tokens_loaded
            computed += representation.tokens_computed
        answers = [found[row] for row in asked.rows]
        caches = [cache for _, cache in answers if cache is not None]
        return [logits for logits, _ in answers], caches, loaded, computed

    def _ask_output_class(self, token: int) -> type[ModelOutput]:
        """Return the class of the model's outputs, from a call with one token: annotations need not be true."""
        device = self.engine.device
        with plain_torch(device):
            token_ids = torch.tensor([[token]], device=device)
            output = self._forward(input_ids=token_ids, use_cache=True, return_dict=True)
        if not isinstance(output, ModelOutput) or not output.keys() <= {"logits", "past_key_values"}:
            raise UnsupportedModelError("the model's outputs hold more than logits and a cache")
        self._output_class = type(output)
        return self._output_class


@contextmanager
def cached(
    model: Any, tokenizer: Any, db: PromptDB | str | os.PathLike[str], *, last_logits: bool = False, **options: Any
) -> Iterator[Cached]:
    """Make ordinary calls of a model read from a store and fill it, inside of a ``with`` block.

    Parameters
    ----------
    model : a Hugging Face decoder in eval mode on one device, or a peft model around one.
    tokenizer : the model's tokenizer. Calls pass token IDs; it is a part of the key that they are stored under.
    db : the store, or the path of one, which is then closed at the end.
    last_logits : the caller reads the logits of the last position only: calls that do not say ``logits_to_keep`` return
        these, ``[rows, 1, vocabulary]``, from the store. Otherwise such a call returns the logits of all positions,
        which are not stored, and computes the whole prompt.
    **options : those of :class:`~promptdb.Engine`: ``namespace``, ``strict``, ``write_behind``.

    Yields
    ------
    Cached

    Raises
    ------
    ModelError
        Calls of this model are cached already.
    UnsupportedModelError, TrainModeError, ModelPlacementError, IdentityError, StoreError
        The model or the store cannot be used: see :class:`~promptdb.Engine` and :class:`~promptdb.PromptDB`. Adapters
        that put tokens of their own before the prompt are refused.

    Notes
    -----
    Served are prompts ``[rows, tokens]`` without padding, with no cache or with an empty ``DynamicCache``, which is
    filled in place; each row is looked up by itself, and equal rows once. A cache that a call returns is a
    ``DynamicCache``. Everything else goes to the model as it is, with the same results and errors: padding, labels,
    embeddings, hidden states and attentions, other caches, train mode, autocast, gradients (unless no parameter
    requires any), hooks and patches, modes and transformations of torch, ``torch.compile``. So does every step of
    ``generate`` but the first. A store that fails raises :class:`~promptdb.errors.StoreError` from the call.

    The model's weights ID is the same inside and outside. A peft model is stored under the ID of its base model with
    the adapters in place, not under that of the wrapper.

    Cost: the first served call runs one token to learn the class of the outputs; every call checks whether the model
    has changed (see :class:`promptdb.watch.ModelWatch`).

    The block concerns all threads. Calls from several threads are safe: full hits run side by side, computations one
    after the other, untouched calls as without the block. Calls must have returned before the block ends. In a forked
    child they go to the model. A model cannot be in two blocks at a time; one block after the other is fine.

    Examples
    --------
    >>> with promptdb.cached(model, tokenizer, "team.promptdb") as calls:  # doctest: +SKIP
    ...     model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
    """
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in _adapters(model)):
        raise UnsupportedModelError(
            "an adapter puts tokens of its own before the prompt", "adapters of weights, such as LoRA, can be used"
        )
    # The model inside of an adapter's wrapper is what generate calls, and the adapter's layers are a part of it.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with ExitStack() as stack:
        store = db if isinstance(db, PromptDB) else stack.enter_context(PromptDB(db))
        engine = stack.enter_context(Engine(store, inner, tokenizer, **options))
        calls = Cached(engine, inner.forward, last_logits=last_logits)
        stack.enter_context(_installed(inner, calls))
        yield calls


def _adapters(model: Any) -> list[Any]:
    adapters = getattr(model, "peft_config", None)
    return list(adapters.values()) if isinstance(adapters, dict) else []


@contextmanager
def _installed(model: torch.nn.Module, calls: Cached) -> Iterator[None]:
    """Put the stand-in in front of the model's ``forward``, and take it away again."""
    attributes = vars(model)
    with _installing:
        before = attributes.get("forward")
        if isinstance(before, Interception):
            raise ModelError("calls of this model are cached already", "leave the other `with` block first")
        stand_in = attributes["forward"] = Interception(calls._forward, calls._call)
    try:
        yield
    finally:
        calls._is_over = True  # whoever has kept the stand-in reaches the model
        if attributes.get("forward") is stand_in:  # and not what somebody has put there meanwhile
            if before is None:
                del attributes["forward"]
            else:
                attributes["forward"] = before


def _joined(caches: list[PromptCache], target: DynamicCache | None, config: Any) -> DynamicCache:
    """Return the caches of all rows as one: in the caller's, if there is one, as the model would have filled it."""
    if target is None and len(caches) == 1:
        return caches[0]
    target = DynamicCache(config=config) if target is None else target
    for number, layer in enumerate(caches[0].layers):
        if layer.is_initialized:
            layers = [cache.layers[number] for cache in caches]
            keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
            is_one = len(layers) == 1  # update copies
            target.update(keys[0] if is_one else torch.cat(keys), values[0] if is_one else torch.cat(values), number)
    return target
