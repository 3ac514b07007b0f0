"""Keys and values in 8 bits: smaller by half or three quarters, and approximate. Never mixed with exact ones.

Each head's vector of each token gets a scale of its own, so that one large number spoils no more than its vector: the
largest becomes 127 steps, and no number is off by more than half a step, 1/254 of its vector's largest.
"""

from __future__ import annotations

import torch

_STEPS = 127


def quantise(numbers: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Write numbers as codes and scales.

    Parameters
    ----------
    numbers : finite, ``[..., head_dim]``.
    codes : int8, of the same shape; written.
    scales : float32, without the last dimension; written. A code times its scale is the number.
    """
    wide = numbers.float()
    torch.div(wide.abs().amax(-1), _STEPS, out=scales)
    # A vector of zeros, or of numbers too small for a scale, becomes zeros.
    divisor = torch.where(scales > 0, scales, torch.ones_like(scales)).unsqueeze(-1)
    codes.copy_(torch.round(wide / divisor).clamp_(-_STEPS, _STEPS))


def dequantise(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers of codes and scales, in fresh memory."""
    return (codes.to(torch.float32) * scales.unsqueeze(-1)).to(dtype)
