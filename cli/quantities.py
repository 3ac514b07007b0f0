"""Sizes and durations as people write them: 20GB, 512MiB, 7d, 12h."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import click

_SIZE_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_DURATION_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


def _parse(text: str, units: Mapping[str, float]) -> float | None:
    """Return a number with a unit, or None if it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text, re.ASCII)
    if found is None or found[2].lower() not in units:
        return None
    return float(found[1]) * units[found[2].lower()]


def size_option(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Return the bytes of ``20GB`` (decimal), ``20GiB`` (binary) or ``none`` (0): a callback of an option."""
    if value is None:
        return None
    found = 0.0 if value.lower() == "none" else _parse(value, _SIZE_UNITS)
    if found is None or found >= 2**62:
        raise click.BadParameter(f"{value!r} is no size; 500MB, 20GB and 20GiB are", ctx, param)
    return int(found)


def duration_option(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Return the seconds of ``90s``, ``30min``, ``12h``, ``7d``, ``2w`` or ``none`` (infinite): a callback."""
    if value is None:
        return None
    found = math.inf if value.lower() == "none" else _parse(value, _DURATION_UNITS)
    if not found:
        raise click.BadParameter(f"{value!r} is no duration; 90s, 30min, 12h, 7d and 2w are", ctx, param)
    return found
