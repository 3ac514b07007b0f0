"""Attaching hooks to a model: which module each one belongs to, and what is done before and after that module runs.

Nothing of a model is copied or replaced. Everything is a forward hook of torch, removed when the block is left.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch

from promptdb.errors import ModelError
from promptdb.hook_attention import Call, entered, leave
from promptdb.hook_binding import Binding, Where
from promptdb.hook_context import PrecomputeContext
from promptdb.hook_loss import with_logits, with_loss
from promptdb.hook_points import POINTS
from promptdb.hook_points import HookVariableNames as N
from promptdb.refusals import IDENTIFIED

__all__ = ["Attachment", "StopPass"]

_ATTACHED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_TAKEN = threading.Lock()


class StopPass(Exception):  # noqa: N818 - no error: it ends a pass of which nothing more is wanted
    """Ends a forward pass after the last layer that somebody wanted."""


class Attachment:
    """Hooks that are attached to a model, until :meth:`remove`. A context manager.

    Parameters
    ----------
    model : a Hugging Face decoder with a language-model head; with an adapter of peft, too.
    pctx : the hooks. Those that are added to it later are not attached.
    last_layer : end each pass, with :class:`StopPass`, after this layer.
    is_identified : the hooks change nothing, or carry an ID under which their results are stored: the model still
        counts as identified. Of keys and values, they change those of new tokens only, whether a prompt is computed in
        one pass or in several.

    Raises
    ------
    UnsupportedModelError
        A point that the architecture, or a layer, does not have, with the reason.
    InputTypeError
        No such layer or module.
    ModelError
        The model is compiled, recomputes its layers, or has hooks of another context.

    Notes
    -----
    Hooks see the passes of the thread that attached them. Cost: some 5 microseconds a hook and module.
    """

    def __init__(
        self, model: Any, pctx: PrecomputeContext, *, last_layer: int | None = None, is_identified: bool = False
    ) -> None:
        _refuse_skipping(model)
        self._binding = Binding(model, pctx.hooks)
        self._bound = self._binding.hooks
        self.model, self.pctx = self._binding.model, pctx
        self._thread = threading.get_ident()
        self._is_identified = is_identified
        self._fired: Counter[Where] = Counter()
        self._calls: dict[int, Call] = {}
        self._signature = inspect.signature(self.model.forward)
        self._own_implementation: str | None = None
        # Of the pass that runs: the first position, new and all tokens (None: no pass), and what the loss needs.
        self._first, self._new = 0, 0
        self._total: int | None = None
        self._labels: Any = None
        self._num_items: Any = None
        self._handles: list[Any] = []
        self._is_attached = False
        with _TAKEN:
            if self.model in _ATTACHED:
                raise ModelError("the model has hooks of another context", "put all hooks into one PrecomputeContext")
            _ATTACHED.add(self.model)
            self._is_attached = True
        try:
            self._register(last_layer)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take all hooks off, and leave the model as it was. Harmless when done twice."""
        if not self._is_attached:
            return
        self._is_attached = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._restore()
        _ATTACHED.discard(self.model)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # Attaching

    def _register(self, last_layer: int | None) -> None:
        model, binding = self.model, self._binding
        self._add(model.register_forward_pre_hook, self._begin, with_kwargs=True)
        inside: dict[int, list[str]] = {}
        for name, layer in self._bound:
            side = binding.place(name).side if name in POINTS else "out"
            if side == "attn":
                assert layer is not None
                inside.setdefault(layer, []).append(name)
            elif side != "end":
                self._register_side(binding.module(name, layer), side, (name, layer))
        for layer, names in inside.items():
            self._register_attention(binding.module(names[0], layer), layer, names)
        if last_layer is not None:
            self._add(binding.layers()[last_layer].register_forward_hook, self._stop)
        self._add(model.register_forward_hook, self._end, with_kwargs=True, always_call=True)

    def _add(self, register: Callable[..., Any], function: Callable[..., Any], **options: Any) -> None:
        def mine(*args: Any) -> Any:
            return function(*args) if threading.get_ident() == self._thread else None

        setattr(mine, IDENTIFIED, self._is_identified)
        self._handles.append(register(mine, **options))

    def _register_side(self, module: Any, side: str, where: Where) -> None:
        def before(module: Any, args: Any, kwargs: Any) -> Any:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        def after(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(output[0]), *output[1:])
            return change(output)

        def change(x: torch.Tensor) -> torch.Tensor:
            return self._add_to_stream(where, x) if side == "sum" else self._run(where, x)

        if side == "out":
            self._add(module.register_forward_hook, after)
        else:
            self._add(module.register_forward_pre_hook, before, with_kwargs=True)

    def _register_attention(self, module: Any, layer: int, names: list[str]) -> None:
        apply = {name: lambda x, where=(name, layer): self._run(where, x) for name in names}

        def before(module: Any, args: Any, kwargs: Any) -> None:
            cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
            call = Call(apply, cache, self._total or 0, module.config._attn_implementation, module)
            self._calls[layer] = call
            entered(call)

        def after(module: Any, args: Any, output: Any) -> None:
            call = self._calls.pop(layer, None)
            if call is not None:
                leave(call)

        self._add(module.register_forward_pre_hook, before, with_kwargs=True)
        self._add(module.register_forward_hook, after, always_call=True)

    # While the model runs

    def _begin(self, module: Any, args: Any, kwargs: Any) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**given.pop("kwargs", {}), **given}
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if embeds is not None and (N.POST_TOK_EMBEDDINGS, None) in self._bound:
            raise ModelError(f"{N.POST_TOK_EMBEDDINGS}: the model was given inputs_embeds", "give it input_ids")
        if given.get("labels") is None and (N.UNREDUCED_LOSS, None) in self._bound:
            raise ModelError(f"{N.UNREDUCED_LOSS}: the model was given no labels", "model(ids, labels=ids, pctx=pctx)")
        cache = given.get("past_key_values")
        self._labels, self._num_items = given.get("labels"), given.get("num_items_in_batch")
        self._new = int(ids.shape[-1]) if ids is not None else int(embeds.shape[-2]) if embeds is not None else 0
        self._first = int(cache.get_seq_length()) if cache is not None else 0
        self._total = self._first + self._new
        self.pctx.past_key_values = cache
        self._fired.clear()
        if any(name in POINTS and POINTS[name].inside == "scores" for name, _ in self._bound):
            self._own_implementation = module.config._attn_implementation
            module.config._attn_implementation = "eager"

    def _end(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        is_whole = output is not None
        self._restore()
        try:
            if not is_whole:  # an error is on its way
                return None
            if (N.LOGITS, None) in self._bound:
                output = with_logits(module, output, lambda x: self._run((N.LOGITS, None), x), self._labels)
            if (N.UNREDUCED_LOSS, None) in self._bound:
                change = lambda x: self._run((N.UNREDUCED_LOSS, None), x)  # noqa: E731
                output = with_loss(output, change, self._labels, self._num_items)
            self._check()
        finally:
            self._forget()
        return output

    def _stop(self, module: Any, args: Any, output: Any) -> None:
        raise StopPass

    def _restore(self) -> None:
        for call in self._calls.values():
            leave(call)
        self._calls.clear()
        if self._own_implementation is not None:
            self.model.config._attn_implementation, self._own_implementation = self._own_implementation, None

    def _forget(self) -> None:
        self._first, self._new, self._total = 0, 0, None
        self._labels = self._num_items = self.pctx.past_key_values = None

    def _check(self) -> None:
        """Raise unless each point was reached once: a hook that never fires is worse than none."""
        for where in self._bound:
            if self._fired[where] != 1:
                name, layer = where
                place = name if layer is None or name not in POINTS else f"{name} of layer {layer}"
                raise ModelError(
                    f"{place} was reached {self._fired[where]} times in one pass",
                    "layers that are skipped, or modules that run several times, cannot be hooked",
                )

    def _add_to_stream(self, where: Where, x: torch.Tensor) -> torch.Tensor:
        """Show the residual stream to its hooks, and change it in its place: it is added to again later."""
        given = x.clone()  # who keeps it must not see it change
        result = self._run(where, given)
        if result is not given:
            x.copy_(result)
        return x

    def _run(self, where: Where, x: torch.Tensor) -> torch.Tensor:
        name, layer = where
        self._fired[where] += 1
        given, point = x, POINTS.get(name)
        if point is not None and point.shape in ("b n d", "b n f") and x.dim() == 2:  # some MLPs run on [b * n, d]
            given = x.view(-1, self._new or x.shape[0], x.shape[1])
        dim = 1 if point is None else point.token_dim
        count = given.shape[dim] if given.dim() > dim else 0
        total = self._total if self._total is not None else count
        # Keys and values are those of the last tokens; so are logits, where only some are kept.
        first = total - count if name in (N.KEY_STATES, N.VALUE_STATES, N.LOGITS) else self._first
        result: torch.Tensor = self.pctx.call(self._bound[where], given, first, total, dim, layer)
        if result is given:
            return x
        past = self._first - first
        if past > 0 and self._is_identified and name in (N.KEY_STATES, N.VALUE_STATES):
            # Those of the past, loaded or kept, have been changed already.
            kept, new = given.narrow(dim, 0, past), result.narrow(dim, past, count - past)
            result = torch.cat((kept, new), dim)
        return result.reshape(x.shape)


def _refuse_skipping(model: torch.nn.Module) -> None:
    """Raise :class:`ModelError` if hooks would be skipped, or called twice."""
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None:
            raise ModelError(f"{where} is compiled, and would skip hooks", "pass the model as it was before")
        if module.training and getattr(module, "gradient_checkpointing", False):
            raise ModelError(
                f"{where} computes its layers again in the backward pass, where hooks would be called again",
                "call model.gradient_checkpointing_disable()",
            )
