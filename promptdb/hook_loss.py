"""Logits and loss under hooks: what a model returns is put together again from what the hooks made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_Change = Callable[[torch.Tensor], torch.Tensor]
_IGNORED = -100  # label of positions that do not count, as everywhere in transformers


def with_logits(model: Any, output: Any, change: _Change, labels: torch.Tensor | None) -> Any:
    """Return a model's output with its logits shown to their hooks, and the loss that follows from them.

    Parameters
    ----------
    output : what the model returned: a ``ModelOutput`` or a tuple.
    labels : as given to the model, or None.
    """
    logits = _get(output, "logits", labels is not None)
    changed = change(logits)
    if changed is logits:
        return output
    output = _set(output, "logits", labels is not None, changed)
    if labels is not None:
        vocabulary = model.config.get_text_config().vocab_size
        output = _set(output, "loss", True, model.loss_function(changed, labels, vocabulary))
    return output


def with_loss(output: Any, change: _Change, labels: torch.Tensor, num_items: Any) -> Any:
    """Return a model's output with the loss of each token shown to its hooks: ``[b, n - 1]``, 0 where none counts.

    A changed one becomes the loss: its sum over the number of tokens that count, as in transformers.
    """
    logits = _get(output, "logits", True)
    targets = labels[:, 1:].to(logits.device)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=_IGNORED, reduction="none"
    )
    changed = change(losses)
    if changed is losses:
        return output
    count = (targets != _IGNORED).sum() if num_items is None else num_items
    return _set(output, "loss", True, changed.sum() / count)


def _get(output: Any, name: str, has_loss: bool) -> Any:
    return output[1 if has_loss else 0] if isinstance(output, tuple) else getattr(output, name)


def _set(output: Any, name: str, has_loss: bool, value: torch.Tensor) -> Any:
    if not isinstance(output, tuple):
        setattr(output, name, value)
        return output
    at = 0 if name == "loss" else int(has_loss)
    return (*output[:at], value, *output[at + 1 :])
