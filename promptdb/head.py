"""Logits of a pass on the CPU, in memory that was in use before.

They are the largest thing that a pass makes, 100 MB for 512 tokens of GPT-2, and the C allocator returns so much to the
system at once: every pass would touch all of it as fresh pages, which took 40 ms of 840 where it was measured.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from promptdb.buffers import POOL
from promptdb.cache import pooled_empty

# Up to 32 MiB the C allocator keeps them (promptdb.allocator), and somewhat larger ones gain less than the mode costs:
# 10 microseconds for each of 750 calls in a pass of GPT-2. The largest would take the room of the pool's other buffers.
_LEAST_BYTES = 48 << 20
_MOST_BYTES = POOL.max_idle_bytes // 4


def pooled_logits(model: Any, num_rows: int) -> AbstractContextManager[object]:
    """Return a context in which a model's output layer writes into pooled memory. The numbers are the same, bit by bit.

    Only where that pays: on the CPU, for large results. Neither the model nor other threads see anything of it.

    Parameters
    ----------
    num_rows : rows that the output layer is going to be given.

    Notes
    -----
    A tensor of logits owns its memory as long as anything refers to it: see :mod:`promptdb.buffers`. Cost: 10
    microseconds for each call of a function of torch.
    """
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if type(weight) is not torch.nn.Parameter or weight.device.type != "cpu" or weight.dim() != 2:
        return nullcontext()
    if not _LEAST_BYTES <= num_rows * weight.shape[0] * weight.itemsize <= _MOST_BYTES:
        return nullcontext()
    return _Pooled(weight)


class _Pooled(TorchFunctionMode):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self._weight = weight

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear and len(args) == 3 and args[1] is self._weight and not kwargs:
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    is_ordinary = (
        type(states) is torch.Tensor
        and (states.device, states.dtype) == (weight.device, weight.dtype)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )
    if not is_ordinary:
        return linear(states, weight, bias)
    rows = states.reshape(-1, states.shape[-1])
    logits = pooled_empty((rows.shape[0], weight.shape[0]), weight.dtype, weight.device)
    if bias is None:
        torch.mm(rows, weight.t(), out=logits)
    else:
        torch.addmm(bias, rows, weight.t(), out=logits)
    return logits.view(*states.shape[:-1], weight.shape[0])
