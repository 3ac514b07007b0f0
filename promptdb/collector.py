"""Rows of recorded points while a model runs, and their encoding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from promptdb.activations import Series, entry_specs
from promptdb.blobs import plan_blob
from promptdb.buffers import POOL
from promptdb.cache import DTYPE_NAMES, TORCH_DTYPES
from promptdb.errors import InputTypeError, NonFiniteError, UnsupportedModelError
from promptdb.format import CHECKSUM_BYTES
from promptdb.hook_binding import Where
from promptdb.hook_context import Hook, PrecomputeContext
from promptdb.hook_points import POINTS
from promptdb.keys import pack_tokens
from promptdb.recordings import RecordedRows


class Collector:
    """Keeps what hooks are shown, by point, layer and position. Not thread safe.

    Parameters
    ----------
    wanted : points and layers.

    Notes
    -----
    Nothing is copied while the model runs: what it computes for a point stays in memory until :meth:`clear`.
    """

    def __init__(self, wanted: Sequence[Where]) -> None:
        self._wanted = wanted
        self._kept: dict[Where, list[tuple[int, torch.Tensor]]] = defaultdict(list)

    def hooks(self) -> list[Hook]:
        """Return hooks that keep the points; they change nothing."""
        return [self._hook(name, layer) for name, layer in self._wanted]

    def _hook(self, name: str, layer: int | None) -> Hook:
        def keep(x: torch.Tensor, pctx: PrecomputeContext) -> None:
            if x.dim() < 2 or x.shape[0] != 1:
                raise UnsupportedModelError(
                    f"{name} is {list(x.shape)}, not one row for each token of a prompt", "record another point"
                )
            rows = x.detach()[0]
            if name in POINTS and POINTS[name].token_dim == 2:  # [heads, tokens, head_dim]
                rows = rows.transpose(0, 1)
            self._kept[name, layer].append((pctx.first_position, rows))

        return Hook(name, keep, layers=layer if name in POINTS and POINTS[name].by_layer else None)

    def rows(self, where: Where, positions: Sequence[int]) -> torch.Tensor | None:
        """Return the rows at positions, ``[len(positions), ...]``, or None if one of them was not seen."""
        found, at = [], 0
        while at < len(positions):
            run = self._run(where, positions, at)
            if run is None:
                return None
            found.append(run)
            at += run.shape[0]
        return found[0] if len(found) == 1 else torch.cat(found) if found else None

    def _run(self, where: Where, positions: Sequence[int], at: int) -> torch.Tensor | None:
        """Return rows for as many positions, from the one number ``at`` on, as one pass has."""
        for first, rows in self._kept[where]:
            end = first + rows.shape[0]
            if first <= positions[at] < end:
                wanted = [position for position in positions[at:] if position < end]
                if wanted[-1] - wanted[0] == len(wanted) - 1:
                    return rows[wanted[0] - first : wanted[-1] + 1 - first]
                return rows[torch.tensor(wanted, device=rows.device) - first]
        return None

    def clear(self) -> None:
        """Let go of everything."""
        self._kept.clear()


def dtype_name(dtype: torch.dtype | str) -> str:
    """Return the store's name of a floating-point dtype, given as torch's or by its name (``"float16"``, ``"F16"``)."""
    known = dtype if isinstance(dtype, torch.dtype) else TORCH_DTYPES.get(dtype, getattr(torch, dtype, None))
    name = DTYPE_NAMES.get(known) if isinstance(known, torch.dtype) else None
    if name not in ("F64", "F32", "F16", "BF16"):
        raise InputTypeError(f"activations cannot be stored as {dtype}", "float64, float32, float16 or bfloat16")
    return name


def encode_rows(node: bytes, series: Series, rows: torch.Tensor, offsets: Sequence[int]) -> RecordedRows:
    """Return rows of a span, ready to be stored: one copy, into pooled memory.

    Parameters
    ----------
    rows : ``[m, ...]``, on any device; converted to the dtype of the series.
    offsets : which tokens of the span they belong to.

    Raises
    ------
    NonFiniteError
        They hold NaN or infinity, in that dtype.
    """
    specs = entry_specs(series.dtype, len(offsets), tuple(rows.shape[1:]), offsets)
    plan = plan_blob(specs)
    value = memoryview(POOL.lease(CHECKSUM_BYTES + plan.size_bytes)).cast("B")
    blob = value[CHECKSUM_BYTES:]
    blob[: len(plan.header)] = plan.header
    at = plan.offsets_bytes[0]
    target = torch.frombuffer(blob[at : at + specs[0].size_bytes], dtype=TORCH_DTYPES[series.dtype])
    target = target.view(specs[0].shape)
    target.copy_(rows)
    if not torch.isfinite(torch.stack(torch.aminmax(target))).all():
        raise NonFiniteError(
            f"{series}: the activations hold NaN or infinity; nothing was stored",
            "check the model's weights, or record them in float32: float16 ends at 65,504",
        )
    if len(specs) > 1:
        at = plan.offsets_bytes[1]
        blob[at : at + specs[1].size_bytes] = pack_tokens(offsets)
    return RecordedRows(node, series, value)
