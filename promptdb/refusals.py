"""Behaviour that was changed from outside, and that no digest can describe, is refused."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from promptdb.code_identity import LIBRARIES
from promptdb.errors import IdentityError
from promptdb.placement import moves_only

if TYPE_CHECKING:
    import torch

__all__ = ["IDENTIFIED", "Interception", "refuse_attention", "refuse_hooks", "refuse_patched"]

IDENTIFIED = "__promptdb_identified__"
"""A hook with this attribute set true is accounted for elsewhere (by an intervention ID), and is not refused."""


class Interception:
    """Stands in for a module's ``forward`` and gives what that gives: no patch, as :func:`refuse_patched` sees it.

    Parameters
    ----------
    forward : what it stands in for; ``inspect.signature`` shows its parameters.
    call : called instead, with the same arguments.

    Notes
    -----
    A copy of the module, or one read from a pickle, has what the stand-in stood for, bound to the copy.
    """

    def __init__(self, forward: Callable[..., Any], call: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what was put in the place of ``forward``."""
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        forward: Any = self.__wrapped__  # type: ignore[attr-defined]
        if isinstance(forward, types.MethodType):
            return getattr, (forward.__self__, forward.__name__)
        return functools.partial, (forward,)


def refuse_patched(where: str, module: torch.nn.Module) -> None:
    """Refuse behaviour that was changed from outside and that no digest can describe."""
    attributes = vars(module)
    if "_orig_mod" in module._modules or attributes.get("_compiled_call_impl") is not None:
        raise IdentityError(f"{where} is compiled", "pass the model as it was before torch.compile (._orig_mod)")
    refuse_hooks(where, module._forward_hooks.values())
    refuse_hooks(where, module._forward_pre_hooks.values())
    forward = attributes.get("forward")
    if type(forward) is Interception:
        forward = forward.__wrapped__  # type: ignore[attr-defined]
    # A patch that was taken back by assignment leaves the module's own method behind.
    if forward is not None and forward != types.MethodType(type(module).forward, module):
        hook, old = attributes.get("_hf_hook"), attributes.get("_old_forward")
        if not (moves_only(hook) and getattr(old, "__func__", None) is type(module).forward):
            raise IdentityError(
                f"{where}.forward is patched", "delete the attribute, or write a subclass: its source is identified"
            )


def refuse_hooks(where: str, hooks: Iterable[Callable[..., Any]]) -> None:
    """Refuse forward hooks, but for those that only take notes and those that carry :data:`IDENTIFIED`."""
    for hook in tuple(hooks):  # other threads attach theirs meanwhile
        origin, name = getattr(hook, "__module__", ""), getattr(hook, "__qualname__", type(hook).__qualname__)
        # Left behind by output_hidden_states=True: it only takes notes. The others let gradients reach the input.
        notes = origin == "transformers.utils.output_capturing"
        grads = name.endswith(("make_inputs_require_grads", "make_inputs_require_grad")) and origin.split(".")[0] in (
            "transformers",
            "peft",
        )
        if not (notes or grads or getattr(hook, IDENTIFIED, False)):
            raise IdentityError(
                f"{where} has a forward hook, {origin}.{name}, that could change the results",
                "remove the handle, or use promptdb.hooks, which names what it changes",
            )


def refuse_attention(where: str, config: Any) -> None:
    """Refuse an attention function of the user's own: implementations are not part of the ID, as libraries' agree."""
    name = getattr(config, "_attn_implementation", None)
    if not isinstance(name, str) or name == "eager":
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    function = ALL_ATTENTION_FUNCTIONS.get(name)
    origin = getattr(function, "__module__", None) or "transformers"
    if origin.split(".")[0] not in LIBRARIES and "/" not in name and not getattr(function, IDENTIFIED, False):
        raise IdentityError(
            f"{where}: attention implementation {name!r} is {origin}.{getattr(function, '__qualname__', function)}",
            "use one that ships with transformers, such as 'sdpa'",
        )
