"""Which ordinary calls of a transformers model a store can answer exactly, and what they ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["Asked", "Reader", "UntouchedError", "check_ambient", "is_recorded"]

_EXTRAS = ("output_attentions", "output_hidden_states", "output_router_logits")
# Models take these through **kwargs as well; any other keyword that a model does not name is not understood here.
_KEYWORDS = {"return_dict", *_EXTRAS}
_UNDERSTOOD = {
    *("input_ids", "attention_mask", "position_ids", "cache_position", "past_key_values", "use_cache"),
    *("logits_to_keep", *_KEYWORDS),
}


class UntouchedError(Exception):
    """This call is not for the store; the text says why. Never reaches a caller."""


@dataclass(frozen=True)
class Asked:
    """A call that a store can answer.

    Attributes
    ----------
    rows : token IDs, all of one length.
    keep : logits of so many positions at the end are asked for; 0 for all.
    use_cache : whether a cache is returned.
    cache : the caller's own, empty: to be filled.
    return_dict : whether an object is returned, and not a tuple.
    """

    rows: list[tuple[int, ...]]
    keep: int
    use_cache: bool
    cache: DynamicCache | None
    return_dict: bool

    @property
    def is_last(self) -> bool:
        """Whether only the logits after the last token are asked for: those are stored."""
        return self.keep == 1 or len(self.rows[0]) == 1


class Reader:
    """Reads the arguments of calls of one ``forward``.

    Parameters
    ----------
    forward : the model's own.
    config : the model's configuration, which has the defaults; read at every call.
    last_logits : without ``logits_to_keep``, the last position is meant.
    """

    def __init__(self, forward: Callable[..., Any], config: Any, *, last_logits: bool) -> None:
        self._signature = inspect.signature(forward)
        self._config = config
        self._last_logits = last_logits

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Asked:
        """Return what a call asks for.

        Raises
        ------
        UntouchedError
            It says something that is not understood here, or that a store cannot give.
        """
        if not getattr(self._config, "return_dict", True):  # reaches into many a model, and breaks it
            raise UntouchedError("return_dict=False in the configuration")
        given = self._by_name(args, kwargs)
        use_cache, cache = self._flag(given, "use_cache", True), given.get("past_key_values")
        if cache is not None:
            _check_cache(cache)
            if not use_cache:
                raise UntouchedError("a cache with use_cache=False")
        for name in _EXTRAS:
            if self._flag(given, name, False):
                raise UntouchedError(name)
        rows = _rows(given.get("input_ids"), device)
        _check_mask(given.get("attention_mask"), len(rows), len(rows[0]))
        for name in ("position_ids", "cache_position"):
            _check_positions(name, given.get(name), len(rows), len(rows[0]))
        keep = given.get("logits_to_keep", 1 if self._last_logits else 0)
        if type(keep) is not int or keep < 0:
            raise UntouchedError("logits_to_keep is not a count")
        return Asked(rows, keep, use_cache, cache, self._flag(given, "return_dict", True))

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name, if nothing says anything but those that are understood."""
        try:
            given = dict(self._signature.bind(*args, **kwargs).arguments)
        except TypeError:
            raise UntouchedError("arguments that the model does not take") from None
        parameters = self._signature.parameters
        for parameter in parameters.values():
            if parameter.kind is parameter.VAR_POSITIONAL and given.pop(parameter.name, ()):
                raise UntouchedError("arguments without a name")
            if parameter.kind is parameter.VAR_KEYWORD:
                for name, value in given.pop(parameter.name, {}).items():
                    if name not in _KEYWORDS:
                        raise UntouchedError(name)
                    given[name] = value
        for name, value in given.items():
            if name not in _UNDERSTOOD and value is not parameters[name].default:
                raise UntouchedError(name)
        return given

    def _flag(self, given: dict[str, Any], name: str, default: bool) -> bool:
        value = given.get(name)
        return bool(getattr(self._config, name, default) if value is None else value)


def is_recorded() -> bool:
    """Return whether somebody records what the model does, to run it later: that must be the model itself."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return torch.cuda.is_current_stream_capturing()


def check_ambient(model: Any, device: torch.device) -> None:
    """Raise if what is switched on around a call changes results, or what becomes of them.

    Raises
    ------
    UntouchedError
        Train mode, autocast, gradients that somebody could ask for, or a mode or transformation of torch.
    """
    if model.training:
        raise UntouchedError("train mode")
    if torch.is_autocast_enabled(device.type):
        raise UntouchedError("autocast")
    if torch.is_grad_enabled():
        hooks = model.get_input_embeddings()._forward_hooks  # such as that of enable_input_require_grads()
        if hooks or any(parameter.requires_grad for parameter in model.parameters()):
            raise UntouchedError("gradients")
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    if torch._C._len_torch_dispatch_stack() or any(type(mode) is not DeviceContext for mode in modes):
        raise UntouchedError("a mode of torch")  # counts, fakes or changes operations
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UntouchedError("torch.func")


def _rows(input_ids: Any, device: torch.device) -> list[tuple[int, ...]]:
    if input_ids is None:
        raise UntouchedError("no input_ids")
    if (
        type(input_ids) is not torch.Tensor  # a subclass may be anything
        or input_ids.dim() != 2
        or not input_ids.numel()
        or input_ids.dtype not in (torch.int64, torch.int32)
        or input_ids.device != device
    ):
        raise UntouchedError("input_ids that are not [rows, tokens] of integers on the model's device")
    return [tuple(row) for row in input_ids.tolist()]


def _check_cache(cache: Any) -> None:
    """Raise unless a cache is an empty ``DynamicCache`` of layers that are nothing but keys and values."""
    if isinstance(cache, DynamicCache) and any(layer.is_initialized for layer in cache.layers):
        raise UntouchedError("continues a cache")
    if type(cache) is not DynamicCache:
        raise UntouchedError(f"a {type(cache).__name__}")
    kinds = {type(layer) for layer in cache.layers} | {cache.layer_class_to_replicate or DynamicLayer}
    if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer} or cache.offloading:
        raise UntouchedError("a cache with layers of its own")


def _check_mask(mask: Any, num_rows: int, num_tokens: int) -> None:
    if mask is None:
        return
    if type(mask) is not torch.Tensor or mask.shape != (num_rows, num_tokens) or mask.is_floating_point():
        raise UntouchedError("an attention_mask that is not [rows, tokens] of integers")
    if not bool((mask == 1).all()):
        raise UntouchedError("padding")


def _check_positions(name: str, positions: Any, num_rows: int, num_tokens: int) -> None:
    if positions is None:
        return
    shapes = ((num_tokens,), (1, num_tokens), (num_rows, num_tokens))
    if (
        type(positions) is not torch.Tensor
        or positions.shape not in shapes
        or positions.is_floating_point()
        or not bool((positions == torch.arange(num_tokens, device=positions.device)).all())
    ):
        raise UntouchedError(f"{name} of its own")
