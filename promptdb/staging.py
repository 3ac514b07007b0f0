"""Copies from the memory map to where the cache lives: directly on the CPU, through pinned memory to a GPU."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

# Large enough for the bus to run at full speed, small enough that two of them cost little pinned memory.
_STAGE_BYTES = 32 << 20


class _Stages:
    """Two pinned buffers, filled in turn while the other one is on its way to the device. One user at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._buffers: list[torch.Tensor] = []
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def next(self) -> tuple[torch.Tensor, int]:
        """Return a buffer that nothing reads from any more, and its number."""
        if not self._buffers:
            self._buffers = [torch.empty(_STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._turn = 1 - self._turn
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()
        return self._buffers[self._turn], self._turn

    def sent(self, number: int, stream: torch.cuda.Stream) -> None:
        """Note that the buffer is being read by ``stream``."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        self._events[number] = event


_stages = _Stages()


def copy_to_device(copies: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> None:
    """Copy each (target, source) pair. The sources, views of the map, are not needed any more when this returns.

    Parameters
    ----------
    copies : pairs of equal shape and dtype; targets on ``device``, sources on the CPU, both with any strides.

    Notes
    -----
    On the CPU one multi-threaded copy each. For CUDA the source goes in pieces into pinned memory and from there to the
    device on a side stream, while the next piece is read; the caller's stream waits for the last one.
    """
    if device.type != "cuda":
        for target, source in copies:
            target.copy_(source)
        return
    with _stages.lock, torch.cuda.device(device):
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        for target, source in copies:
            row_bytes = source[0].numel() * source.dtype.itemsize
            if row_bytes > _STAGE_BYTES:
                with torch.cuda.stream(stream):
                    target.copy_(source)
                continue
            rows = max(1, _STAGE_BYTES // max(1, row_bytes))
            for first in range(0, source.shape[0], rows):
                piece = source[first : first + rows]
                buffer, number = _stages.next()
                staged = buffer[: piece.numel() * piece.dtype.itemsize].view(piece.dtype).view(piece.shape)
                staged.copy_(piece)
                with torch.cuda.stream(stream):
                    landing = staged.to(device, non_blocking=True)
                    target[first : first + rows].copy_(landing)
                    landing.record_stream(stream)
                _stages.sent(number, stream)
        # The caller's stream goes on only after the last copy, so memory freed there later is free here too.
        torch.cuda.current_stream(device).wait_stream(stream)
