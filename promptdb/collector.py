"""Rows of recorded points while a model runs, and their encoding."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

import torch

from promptdb.activations import Series, entry_specs, side_data
from promptdb.blobs import plan_blob
from promptdb.buffers import POOL
from promptdb.cache import DTYPE_NAMES, TORCH_DTYPES
from promptdb.errors import InputTypeError, NonFiniteError, UnsupportedModelError
from promptdb.format import CHECKSUM_BYTES
from promptdb.hook_binding import Where
from promptdb.hook_context import Hook, PrecomputeContext
from promptdb.hook_points import POINTS, HookVariableNames


class Collector:
    """Keeps what hooks are shown, by point, layer and place in the cache. Not thread safe.

    In a pass over one prompt, places in the cache are positions.

    Parameters
    ----------
    one_cache : keep what passes on the last cache showed, and let go of what those on others did.

    Notes
    -----
    Nothing is copied while the model runs: what it computes for a point stays in memory until :meth:`clear`.
    """

    def __init__(self, *, one_cache: bool = False) -> None:
        self._one_cache, self._cache = one_cache, None
        self._kept: dict[Where, list[tuple[int, torch.Tensor]]] = defaultdict(list)

    def hooks(self, wanted: Sequence[Where]) -> list[Hook]:
        """Return hooks that keep points; they change nothing."""
        return [self._hook(name, layer) for name, layer in wanted]

    def _hook(self, name: str, layer: int | None) -> Hook:
        def keep(x: torch.Tensor, pctx: PrecomputeContext) -> None:
            if self._one_cache and x.dim() > 2 and x.shape[0] != 1:
                self.clear()  # rows of a batch: they are computed again, one prompt at a time
                return
            if x.dim() < 2 or x.shape[0] != 1:
                raise UnsupportedModelError(
                    f"{name} is {list(x.shape)}, not one row for each token of a prompt", "record another point"
                )
            rows = x.detach()[0]
            if name in POINTS and POINTS[name].token_dim == 2:  # [heads, tokens, head_dim]
                rows = rows.transpose(0, 1)
            if name == HookVariableNames.PRE_MASK_ATTN_WEIGHTS:
                rows = rows.clone()  # some models add the mask in place
            if self._one_cache and pctx.past_key_values is not self._cache:
                self.clear()
                self._cache = pctx.past_key_values
            self._kept[name, layer].append((pctx.first_position, rows))

        return Hook(name, keep, layers=layer if name in POINTS and POINTS[name].by_layer else None)

    def rows(self, where: Where, positions: Sequence[int]) -> list[torch.Tensor] | None:
        """Return the rows at positions, in runs ``[m, ...]``, or None if one of them was not seen.

        Those of scores and probabilities are ``[m, heads, tokens]``, with as many tokens as their pass had.
        """
        found, at = [], 0
        while at < len(positions):
            run = self._run(where, positions, at)
            if run is None:
                return None
            found.append(run)
            at += run.shape[0]
        return found

    def _run(self, where: Where, positions: Sequence[int], at: int) -> torch.Tensor | None:
        """Return rows for as many positions, from the one number ``at`` on, as one pass has."""
        for first, rows in self._kept[where]:
            end = first + rows.shape[0]
            if first <= positions[at] < end:
                wanted = positions[at : bisect_left(positions, end, at)]
                if wanted[-1] - wanted[0] == len(wanted) - 1:
                    return rows[wanted[0] - first : wanted[-1] + 1 - first]
                return rows[torch.tensor(wanted, device=rows.device) - first]
        return None

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()
        self._cache = None

    def shows(self, cache: object) -> bool:
        """Return whether what is kept is of passes on a cache."""
        return self._cache is not None and self._cache is cache


def dtype_name(dtype: torch.dtype | str) -> str:
    """Return the store's name of a floating-point dtype, given as torch's or by its name (``"float16"``, ``"F16"``)."""
    known = dtype if isinstance(dtype, torch.dtype) else TORCH_DTYPES.get(dtype, getattr(torch, dtype, None))
    name = DTYPE_NAMES.get(known) if isinstance(known, torch.dtype) else None
    if name not in ("F64", "F32", "F16", "BF16"):
        raise InputTypeError(f"activations cannot be stored as {dtype}", "float64, float32, float16 or bfloat16")
    return name


def encode_rows(series: Series, runs: Sequence[torch.Tensor], offsets: Sequence[int], start: int) -> memoryview:
    """Return rows of a span, ready to be stored (see :class:`~promptdb.recordings.RecordedRows`): one copy, into pooled
    memory.

    Parameters
    ----------
    runs : ``[m, ...]`` each, on any device; converted to the dtype of the series. Of scores and probabilities, each row
        is kept as far as its own token.
    offsets : which tokens of the span they belong to, of all runs together.
    start : position of the span's first token.

    Raises
    ------
    NonFiniteError
        They hold NaN or infinity, in that dtype.
    """
    is_ragged = series.point in POINTS and POINTS[series.point].is_pairwise
    lengths = [start + offset + 1 for offset in offsets] if is_ragged else None
    specs = entry_specs(series.dtype, tuple(runs[0].shape[1:]), offsets, lengths)
    plan = plan_blob(specs)
    value = memoryview(POOL.lease(CHECKSUM_BYTES + plan.size_bytes)).cast("B")
    blob = value[CHECKSUM_BYTES:]
    blob[: len(plan.header)] = plan.header
    at = plan.offsets_bytes[0]
    target = torch.frombuffer(blob[at : at + specs[0].size_bytes], dtype=TORCH_DTYPES[series.dtype])
    if lengths is None:
        rows, at = target.view(specs[0].shape), 0
        for run in runs:
            rows[at : at + run.shape[0]].copy_(run)
            at += run.shape[0]
    else:
        _fill_ragged(target, [row for run in runs for row in run], lengths)
    if not _holds(target, series.point):
        raise NonFiniteError(
            f"{series}: the activations hold NaN or infinity; nothing was stored",
            "check the model's weights, or record them in float32: float16 ends at 65,504",
        )
    for at, data in zip(plan.offsets_bytes[1:], side_data(specs, offsets, lengths), strict=True):
        blob[at : at + len(data)] = data
    return value


def _fill_ragged(target: torch.Tensor, rows: Sequence[torch.Tensor], lengths: Sequence[int]) -> None:
    at = 0
    for row, length in zip(rows, lengths, strict=True):
        end = at + row.shape[0] * length
        target[at:end].view(row.shape[0], length).copy_(row[:, :length])
        at = end


def _holds(rows: torch.Tensor, point: str) -> bool:
    lowest, highest = (float(each) for each in torch.aminmax(rows))
    # A mask adds the lowest number there is, which in half precision may become infinite.
    is_low = math.isfinite(lowest) or (point == HookVariableNames.POST_MASK_ATTN_WEIGHTS and lowest == -math.inf)
    return is_low and math.isfinite(highest)
