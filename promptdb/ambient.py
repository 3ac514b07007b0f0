"""Ambient state of torch that would leak into what is stored: autocast, default dtype and device, inference mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """Run as if nobody had set anything: no autocast, no gradients, no inference mode, float32 and CPU by default.

    A representation is stored for everybody who has the same weights, whatever is switched on around the call that
    computed it. Tensors made inside are usable outside of inference mode. Only the default dtype is global to the
    process; it is touched only where somebody has changed it.
    """
    default_dtype = torch.get_default_dtype()
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.autocast(device.type, enabled=False),
    ):
        if default_dtype == torch.float32:
            yield
            return
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default_dtype)
