"""Attention masks of our own: which tokens see which, where that is not simply "all before it"."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Implementations that take a dense additive mask.
_IMPLEMENTATIONS = ("eager", "sdpa")


class Masks:
    """Builds additive masks for one model. Thread safe.

    A float mask is read alike by every architecture that takes a four-dimensional one; a boolean one is not (Gemma 2
    adds it to the scores). Sliding windows are applied here, as a mask that is given is used as it is.

    Parameters
    ----------
    model : a decoder. Whether it really reads the masks so is for the probe to find out.
    config : its configuration.

    Attributes
    ----------
    can_build : whether masks can be built at all: not for attention in chunks, nor for kernels that take no mask.
    """

    def __init__(self, model: Any, config: Any) -> None:
        self._model = model
        text = config.get_text_config()
        layers = DynamicCache(config=config).layers
        windows = [getattr(layer, "sliding_window", None) for layer in layers]
        # One name per layer, where the configuration has them.
        names = list(getattr(text, "layer_types", None) or [])
        if len(names) != len(layers):
            names = ["sliding_attention" if window else "full_attention" for window in windows]
        self._windows: dict[str, int | None] = dict(zip(names, windows, strict=True))
        self._takes_several = _takes_several(model)
        self._known = (
            all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
            and set(names) <= {"full_attention", "sliding_attention"}
            and all(self._windows[name] == window for name, window in zip(names, windows, strict=True))
            # Windows that the layers apply by themselves, by places in the cache.
            and not any(getattr(text, name, None) for name in ("window_size", "attention_layers", "attention_types"))
        )

    @property
    def can_build(self) -> bool:
        """Whether masks can be built for the model as it is set up now."""
        return self._known and getattr(self._model.config, "_attn_implementation", None) in _IMPLEMENTATIONS

    def max_tokens(self) -> int | None:
        """Return the longest prompt whose masks the model takes, in tokens, or None if there is no limit.

        Beyond its shortest window a model whose layers differ needs one mask for each kind of layer.
        """
        if len(set(self._windows.values())) <= 1 or self._takes_several:
            return None
        return min(window for window in self._windows.values() if window is not None)

    def build(
        self, visible: torch.Tensor, query_positions: torch.Tensor, key_positions: torch.Tensor, device: torch.device
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return what to pass as ``attention_mask``: ``[1, 1, q, k]`` in the model's dtype, or one by kind of layer.

        Parameters
        ----------
        visible : ``[q, k]`` bool: whether a query sees a key, windows aside.
        query_positions, key_positions : ``[q]`` and ``[k]`` int64: places in the prompt, where ``visible`` is.
        device : where the mask is wanted.

        Notes
        -----
        Costs q x k x 4 bytes or less for each kind of layer.
        """
        longest = int(query_positions.max()) + 1
        masks: dict[int | None, torch.Tensor] = {}
        by_name = {}
        for name, window in self._windows.items():
            # Within the window, layers with one and layers without see the same.
            reach = window if window is not None and window < longest else None
            if reach not in masks:
                seen = visible
                if reach is not None:
                    seen = visible & (query_positions[:, None] - key_positions[None, :] < reach)
                masks[reach] = self._additive(seen, device)
            by_name[name] = masks[reach]
        if len(masks) == 1:
            return next(iter(masks.values()))
        return by_name

    def _additive(self, visible: torch.Tensor, device: torch.device) -> torch.Tensor:
        dtype = self._model.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        # Not infinity: a row that sees nothing would become NaN in some kernels.
        mask.masked_fill_(~visible, torch.finfo(dtype).min)
        return mask[None, None].to(device)


def _takes_several(model: Any) -> bool:
    """Return whether the decoder's forward pass takes a dictionary of masks, one for each kind of layer."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(inner, "base_model", inner)
    try:
        return "(causal_mask_mapping := attention_mask, dict)" in inspect.getsource(type(decoder).forward)
    except (OSError, TypeError):
        return False
