"""The output layer of a pass on the CPU: the largest product and the largest result of the pass, each of which has a
faster way at some sizes.

Large results go into memory that was in use before. They are the largest thing that a pass makes, 100 MB for 512 tokens
of GPT-2, and the C allocator returns so much to the system at once: every pass would touch all of it as fresh pages,
which took 40 ms of 840 where it was measured.

A few tokens after others that are in the cache take the product the other way round. For 7 to 15 float32 rows times
transposed weights MKL reads all weights once for every three rows; for weights times columns, twice at most. Eight
tokens of GPT-2, two cores: 24 ms and 15 ms, of 100 ms that the whole pass takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from promptdb.ambient import is_watched
from promptdb.buffers import POOL
from promptdb.cache import PromptLayer, pooled_empty

# Up to 32 MiB the C allocator keeps them (promptdb.allocator), and somewhat larger ones gain little. The largest would
# take the room of the pool's other buffers.
_LEAST_BYTES = 48 << 20
_MOST_BYTES = POOL.max_idle_bytes // 4

# Rows for which weights times columns was faster at every size measured, 1.1 to 2.9 times, on one and two threads:
# vocabularies of 32,000 to 262,144, widths of 512 to 2,048, 62 MiB and more. Weights of 2 MiB lose by it.
_FEW_ROWS = range(7, 16)
_LEAST_WEIGHT_BYTES = 60 << 20


def fast_output(model: Any, cache: Any, num_rows: int) -> AbstractContextManager[object]:
    """Return a context for one pass, in which a model's output layer takes the way that is fastest for its size.

    Large results are the same, bit by bit. Those of few rows after tokens that are in the cache are as exact as those
    of a pass of 16 tokens or more: MKL has a more exact way for fewer. A prompt's first pass never takes that way, nor
    does one that somebody watches with a mode of torch. Neither the model nor other threads see anything of it.

    Parameters
    ----------
    cache : a ``Cache`` of transformers that the pass is going to append to.
    num_rows : rows that the output layer is going to be given.

    Notes
    -----
    A tensor of logits owns its memory as long as anything refers to it: see :mod:`promptdb.buffers`. Cost: 10
    microseconds for each call of a function of torch from where the cache's last layer is appended to, if it is a
    :class:`~promptdb.cache.PromptLayer`; otherwise of the whole pass.
    """
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if type(weight) is not torch.nn.Parameter or weight.device.type != "cpu" or weight.dim() != 2:
        return nullcontext()
    last = next((layer for layer in reversed(cache.layers) if layer.is_initialized), None)
    last = last if type(last) is PromptLayer else None
    is_few = last is not None and last.get_seq_length() > 0 and _is_few(weight, num_rows)
    if not is_few and not _LEAST_BYTES <= num_rows * weight.shape[0] * weight.itemsize <= _MOST_BYTES:
        return nullcontext()
    mode = _OutputMode(weight, is_few=is_few)
    return mode if last is None else _late(mode, last)


def _is_few(weight: torch.Tensor, num_rows: int) -> bool:
    is_measured = weight.dtype == torch.float32 and weight.nbytes >= _LEAST_WEIGHT_BYTES and torch._C.has_mkl
    return num_rows in _FEW_ROWS and is_measured and not is_watched()


@contextmanager
def _late(mode: TorchFunctionMode, last: PromptLayer) -> Iterator[None]:
    """Bring in a mode when a layer is about to be appended to, unless the model itself is in another one then."""
    depth = torch._C._len_torch_function_stack()

    def enter() -> None:
        last.before_update = None
        # Modes are left in the reverse order: the model's would be left before this one.
        in_the_models = torch._C._len_torch_function_stack() != depth
        if not in_the_models and not torch.compiler.is_compiling():
            stack.enter_context(mode)

    with ExitStack() as stack:
        last.before_update = enter
        try:
            yield
        finally:
            last.before_update = None


class _OutputMode(TorchFunctionMode):
    def __init__(self, weight: torch.Tensor, *, is_few: bool) -> None:
        super().__init__()
        self._weight, self._is_few = weight, is_few

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear and len(args) == 3 and args[1] is self._weight and not kwargs:
            return _linear(*args, is_few=self._is_few)
        return func(*args, **(kwargs or {}))


def _linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, is_few: bool) -> torch.Tensor:
    is_ordinary = (
        type(states) is torch.Tensor
        and (states.device, states.dtype) == (weight.device, weight.dtype)
        and (bias is None or bias.dtype == weight.dtype)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )
    if not is_ordinary:
        return linear(states, weight, bias)
    rows = states.reshape(-1, states.shape[-1])
    logits = pooled_empty((rows.shape[0], weight.shape[0]), weight.dtype, weight.device)
    if is_few and rows.shape[0] in _FEW_ROWS:
        # copy_ would do this on one thread, in blocks made for square matrices: three times as slow.
        torch.add(torch.mm(weight, rows.t()).t(), 0 if bias is None else bias, out=logits)
    elif bias is None:
        torch.mm(rows, weight.t(), out=logits)
    else:
        torch.addmm(bias, rows, weight.t(), out=logits)
    return logits.view(*states.shape[:-1], weight.shape[0])
