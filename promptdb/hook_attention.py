"""The inside of attention, whatever the model: queries, keys, values, scores and probabilities.

Models of transformers look their attention up by name in a table of functions and fall back on the
``eager_attention_forward`` of their own module. While a layer's attention runs under hooks, its configuration names
:func:`attend`, which shows the hooks what it is given and what comes out, and calls the function that the model had.
Scores and probabilities exist in the eager function only; that one is not copied but watched while it runs: the
addition of the mask, and the softmax.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from promptdb.errors import ModelError, UnsupportedModelError
from promptdb.hook_points import HookVariableNames as N
from promptdb.refusals import IDENTIFIED

__all__ = ["KEY", "Call", "entered", "leave"]

KEY = "promptdb_hooks"
"""Name under which transformers finds :func:`attend`. It reads meaning into some words: sdpa, flash, flex."""

_ADDITIONS = ("add", "add_", "__add__", "__iadd__", "__radd__")
_stack = threading.local()  # calls: those that this thread is inside of


@dataclass(eq=False)
class Call:
    """One run of one layer's attention under hooks.

    Attributes
    ----------
    apply : by point, a function that shows a variable to the hooks and returns what they made of it.
    cache : what the layer's keys and values are kept in, or None.
    total : tokens of the sequence so far, those of this pass included.
    implementation : the name of the model's own attention function.
    module : the layer's attention.
    """

    apply: Mapping[str, Callable[[torch.Tensor], torch.Tensor]]
    cache: Any
    total: int
    implementation: str
    module: Any


def entered(call: Call) -> None:
    """Let the attention that is about to run in this thread go through :func:`attend`."""
    calls = getattr(_stack, "calls", None)
    if calls is None:
        calls = _stack.calls = []
    calls.append(call)
    call.module.config._attn_implementation = KEY


def leave(call: Call) -> None:
    """Undo :func:`entered`. Harmless if it was undone already."""
    calls = getattr(_stack, "calls", None) or []
    if call in calls:
        calls.remove(call)
        call.module.config._attn_implementation = call.implementation


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stand in for an attention function of transformers."""
    calls = getattr(_stack, "calls", None)
    if not calls:
        raise ModelError(
            "this model runs under hooks in another thread", "use a model in one thread at a time, or load it twice"
        )
    call: Call = calls[-1]
    apply = call.apply
    if N.QUERY_STATES in apply:
        query = apply[N.QUERY_STATES](query)
    if N.KEY_STATES in apply or N.VALUE_STATES in apply:
        key, value = _states(call, key, value)
    own = _own_function(call)
    scores = {name: apply[name] for name in _SCORES if name in apply}
    if scores:
        with _Watch(scores, attention_mask) as watch:
            output, weights = own(module, query, key, value, attention_mask, *args, **kwargs)
        watch.check(type(module).__name__)
    else:
        output, weights = own(module, query, key, value, attention_mask, *args, **kwargs)
    if N.ATTN_WEIGHTED_VALUES in apply:  # [b, n, h, c] here
        output = apply[N.ATTN_WEIGHTED_VALUES](output.transpose(1, 2)).transpose(1, 2)
    return output, weights


setattr(attend, IDENTIFIED, True)  # hooks whose results are stored carry an ID
AttentionInterface.register(KEY, attend)

_SCORES = (N.PRE_MASK_ATTN_WEIGHTS, N.POST_MASK_ATTN_WEIGHTS, N.ATTN_PROBS)


def _own_function(call: Call) -> Callable[..., Any]:
    """Return the attention function that the model uses without hooks."""
    if call.implementation not in ("eager", None):
        return ALL_ATTENTION_FUNCTIONS[call.implementation]  # type: ignore[no-any-return]
    for cls in type(call.module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        f"{type(call.module).__name__} has no eager attention function of its own", "hook a module's path instead"
    )


def _states(call: Call, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Show keys and values, past ones included, to their hooks; what they change is changed in the cache too."""
    layer = None
    if call.cache is not None:
        cache = getattr(call.cache, "self_attention_cache", call.cache)
        layer = cache.layers[call.module.layer_idx]
        if not isinstance(layer, DynamicLayer):
            raise UnsupportedModelError(
                f"keys and values in a {type(layer).__name__} cannot be hooked: not all of its places are filled",
                "use a dynamic cache, which is the default",
            )
    changed = []
    for name, states, kept in ((N.KEY_STATES, key, "keys"), (N.VALUE_STATES, value, "values")):
        result = call.apply[name](states) if name in call.apply else states
        if result is not states and layer is not None:
            _keep(layer, kept, result)
        changed.append(result)
    return changed[0], changed[1]


def _keep(layer: Any, name: str, states: torch.Tensor) -> None:
    held = getattr(layer, name)
    tail = states[..., states.shape[-2] - held.shape[-2] :, :]  # a sliding layer keeps the last ones only
    if torch.is_grad_enabled():
        setattr(layer, name, tail)
    else:
        held.copy_(tail)


class _Watch(TorchFunctionMode):
    """Finds the scores and probabilities of an eager attention function while it runs.

    Before the mask is added, its other operand is what PRE_MASK_ATTN_WEIGHTS names; what the softmax is given, and what
    it returns, are the other two.
    """

    def __init__(self, apply: Mapping[str, Callable[[torch.Tensor], torch.Tensor]], mask: torch.Tensor | None) -> None:
        super().__init__()
        self._apply, self._mask = apply, mask
        self._num_masked = self._num_softmax = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ADDITIONS and not self._num_softmax and len(args) == 2:
            at = 0 if self._is_mask(args[1]) else 1 if self._is_mask(args[0]) else None
            if at is not None:
                self._num_masked += 1
                args = tuple(
                    self._show(N.PRE_MASK_ATTN_WEIGHTS, each) if i == at else each for i, each in enumerate(args)
                )
        elif name == "softmax":
            self._num_softmax += 1
            scores = args[0]
            if self._mask is None:
                self._num_masked += 1
                scores = self._show(N.PRE_MASK_ATTN_WEIGHTS, scores)
            scores = self._show(N.POST_MASK_ATTN_WEIGHTS, scores)
            return self._show(N.ATTN_PROBS, func(scores, *args[1:], **kwargs))
        return func(*args, **kwargs)

    def _is_mask(self, operand: Any) -> bool:
        mask = self._mask
        return operand is mask or (
            mask is not None
            and isinstance(operand, torch.Tensor)
            and operand.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()
        )

    def _show(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self._apply[name](x) if name in self._apply else x

    def check(self, where: str) -> None:
        """Raise unless each was found exactly once."""
        if (self._num_masked, self._num_softmax) != (1, 1):
            raise UnsupportedModelError(
                f"the attention of {where} adds {self._num_masked} masks and takes {self._num_softmax} softmaxes, not "
                "one each: its scores cannot be told",
                "hook queries, keys, values or attn-weighted-values instead",
            )
