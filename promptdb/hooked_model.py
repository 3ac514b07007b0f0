"""A model that takes hooks with every call: ``model(ids, pctx=pctx)``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Self

import torch

from promptdb.errors import InputTypeError
from promptdb.hook_context import Hook, PrecomputeContext
from promptdb.hook_wiring import Attachment

__all__ = ["HookedGPTNeoXForCausalLM", "HookedModel", "HookedOPTForCausalLM", "hooked"]


class HookedModel(torch.nn.Module):
    """A Hugging Face decoder, as ``unhooked``, that can be called with hooks. Has that one's methods as well.

    Parameters
    ----------
    model : the decoder. It is not changed, and not copied: its weights, mode and device are this one's.

    Notes
    -----
    Without hooks a call is the model's own. Queries, keys and values can be hooked under any attention implementation;
    scores and probabilities make a pass use the eager one. Not thread safe, as models are not.

    Examples
    --------
    >>> from promptdb.demo_models import random_model
    >>> from promptdb.hooks import Hook, HookVariableNames, PrecomputeContext, hooked
    >>> model = hooked(random_model("gpt2"))
    >>> seen = []
    >>> pctx = PrecomputeContext(model.config, [Hook(HookVariableNames.POST_MLP, lambda x, ctx: seen.append(x.shape))])
    >>> _ = model(torch.tensor([[5, 6, 7]]), pctx=pctx)
    >>> seen
    [torch.Size([1, 3, 64]), torch.Size([1, 3, 64])]
    """

    def __init__(self, model: Any) -> None:
        if not hasattr(model, "config") or not isinstance(model, torch.nn.Module):
            raise InputTypeError(
                f"{type(model).__name__} is not a Hugging Face model",
                "hooked(AutoModelForCausalLM.from_pretrained(...))",
            )
        super().__init__()
        self.unhooked: Any = model.unhooked if isinstance(model, HookedModel) else model
        self.training = self.unhooked.training

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | os.PathLike[str], **options: Any) -> Self:
        """Load a checkpoint as ``AutoModelForCausalLM.from_pretrained`` does; the checkpoint says which architecture.

        Raises
        ------
        OSError
            There is no such checkpoint.
        """
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(path_or_hub_id, **options))

    def forward(self, *args: Any, pctx: PrecomputeContext | None = None, **kwargs: Any) -> Any:
        """Call the model, with the hooks of ``pctx`` if it is given.

        Raises
        ------
        UnsupportedModelError, InputTypeError, ModelError
            A hook cannot be attached (see :class:`~promptdb.hook_wiring.Attachment`), or a point was not reached
            exactly once.
        """
        if pctx is None or not pctx.hooks:
            return self.unhooked(*args, **kwargs)
        with Attachment(self.unhooked, pctx):
            return self.unhooked(*args, **kwargs)

    def generate(self, *args: Any, pctx: PrecomputeContext | None = None, **kwargs: Any) -> Any:
        """Call the model's ``generate``; hooks see each of its passes. It computes logits of last tokens only."""
        if pctx is None or not pctx.hooks:
            return self.unhooked.generate(*args, **kwargs)
        with Attachment(self.unhooked, pctx):
            return self.unhooked.generate(*args, disable_compile=True, **kwargs)

    def attach(self, hooks: PrecomputeContext | Iterable[Hook]) -> Attachment:
        """Attach hooks until they are removed, for code that calls the model itself.

        Returns
        -------
        Attachment
            ``remove()`` takes them off; as a context manager, the end of the block does.
        """
        pctx = hooks if isinstance(hooks, PrecomputeContext) else PrecomputeContext(self.config, hooks)
        return Attachment(self.unhooked, pctx)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "unhooked":  # before __init__ is through
                raise
            return getattr(self.unhooked, name)


class HookedOPTForCausalLM(HookedModel):
    """A :class:`HookedModel` by the name that it had in precompute."""


class HookedGPTNeoXForCausalLM(HookedModel):
    """A :class:`HookedModel` by the name that it had in precompute."""


def hooked(model: Any) -> HookedModel:
    """Return a model as one that takes hooks; see :class:`HookedModel`."""
    return HookedModel(model)
