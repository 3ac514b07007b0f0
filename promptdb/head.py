"""Logits of a pass on the CPU, in memory that was in use before.

They are the largest thing that a pass makes, 100 MB for 512 tokens of GPT-2, and the C allocator returns so much to the
system at once: every pass would touch all of it as fresh pages, which takes a third as long as computing the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from promptdb.buffers import POOL
from promptdb.cache import pooled_empty
from promptdb.refusals import Interception

# Smaller ones the C allocator keeps; larger ones would take the room of the pool's other buffers.
_LEAST_BYTES = 8 << 20
_MOST_BYTES = POOL.max_idle_bytes // 4

_LINEAR = torch.nn.Linear
_FORWARD = _LINEAR.forward


@contextmanager
def pooled_logits(model: Any) -> Iterator[None]:
    """Let a model's output layer write into pooled memory, inside the block; the numbers are the same, bit by bit.

    Only where that layer is a plain ``torch.nn.Linear`` on the CPU that nobody has patched; others are left alone. The
    caller sees to it that one thread at a time is in the block for a model.

    Notes
    -----
    A tensor of logits owns its memory as long as anything refers to it: see :mod:`promptdb.buffers`.
    """
    layer = model.get_output_embeddings()
    if not _is_plain(layer):
        yield
        return

    def forward(states: torch.Tensor) -> torch.Tensor:
        return _linear(layer, states)

    vars(layer)["forward"] = Interception(layer.forward, forward)
    try:
        yield
    finally:
        vars(layer).pop("forward", None)


def _is_plain(layer: Any) -> bool:
    return (
        type(layer) is _LINEAR
        and _LINEAR.forward is _FORWARD
        and "forward" not in vars(layer)
        and type(layer.weight) is torch.nn.Parameter
        and layer.weight.device.type == "cpu"
    )


def _linear(layer: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
    weight, bias = layer.weight, layer.bias
    count, width = states.numel() // max(1, states.shape[-1]), weight.shape[0]
    is_ordinary = (
        type(states) is torch.Tensor
        and (states.device, states.dtype) == (weight.device, weight.dtype)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and _LEAST_BYTES <= count * width * weight.itemsize <= _MOST_BYTES
    )
    if not is_ordinary:
        return _FORWARD(layer, states)
    rows = states.reshape(count, states.shape[-1])
    logits = pooled_empty((count, width), weight.dtype, weight.device)
    if bias is None:
        torch.mm(rows, weight.t(), out=logits)
    else:
        torch.addmm(bias, rows, weight.t(), out=logits)
    return logits.view(*states.shape[:-1], width)
