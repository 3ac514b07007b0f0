"""Ambient state of torch that would leak into what is stored: autocast, default dtype and device, inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """Run as if nobody had set anything: no autocast, no gradients, no inference mode, float32 and CPU by default.

    A representation is stored for everybody who has the same weights, whatever is switched on around the call that
    computed it. Tensors made inside are usable outside of inference mode. Only the default dtype is global to the
    process; it is touched only where somebody has changed it.
    """
    default_dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            # Not otherwise: a default device sends every call of torch through Python.
            stack.enter_context(torch.device("cpu"))
        if default_dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, default_dtype)
        yield


def is_watched() -> bool:
    """Return whether a mode of torch sees every call that this thread makes; it may keep the tensors."""
    return bool(torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())


def _settle_vector_math() -> None:
    """Call each of MKL's vector functions once, on one thread.

    The first call of one in a process may run at low precision if several threads make it (pytorch #188792): off by
    1e-4, once, silently, and then stored for good.
    """
    names = "acos asin atan cos erf erfc erfinv exp log log2 log10 sin sqrt tan tanh trunc expm1 log1p sigmoid"
    for dtype in (torch.float32, torch.float64):
        for name in names.split():
            getattr(torch, name)(torch.full((1,), 0.5, dtype=dtype, device="cpu"))


_settle_vector_math()
