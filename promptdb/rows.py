"""Reading recorded rows of a prompt into tensors of their own. Imports torch where it makes one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from promptdb.activations import Piece, Series, pieces, series_of
from promptdb.buffers import POOL
from promptdb.errors import CorruptDataError, InputTypeError, NotRecordedError, UnsupportedModelError
from promptdb.gather import Copy, copy_all
from promptdb.hook_points import POINTS, HookVariableNames, canonical_name
from promptdb.keys import num_tokens

if TYPE_CHECKING:
    import torch

    from promptdb.snapshot import Match, Snapshot
    from promptdb.tables import Reader

_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def checked_point(point: str, layer: int | None) -> tuple[str, int | None]:
    """Return a point's name and layer as they are stored.

    Raises
    ------
    InputTypeError
        No such point, or a layer missing or too many.
    """
    name, named = canonical_name(point)
    known = POINTS.get(name)
    by_layer = known is not None and known.by_layer
    if named is not None and layer in (None, named):
        layer = named
    if layer is not None and (type(layer) is not int or layer < 0):
        raise InputTypeError(f"layer is {layer!r}", "layers are numbered from 0")
    if by_layer != (layer is not None):
        raise InputTypeError(
            f"{point!r} is in each layer: which one?" if by_layer else f"{point!r} is in one place, whatever the layer",
            f"activations(prompt, {point!r}, 3)" if by_layer else "leave the layer out",
        )
    return name, layer


def positions_of(positions: int | slice | Iterable[int] | None, total: int) -> Sequence[int] | None:
    """Return positions rising, each once."""
    if positions is None:
        return None
    if isinstance(positions, slice):
        positions = range(*positions.indices(total))
    if isinstance(positions, range) and positions.step == 1 and positions.start >= 0:
        wanted: Sequence[int] = positions
    else:
        try:
            asked = [positions] if isinstance(positions, int) else list(positions)
            wanted = sorted({at + total if at < 0 else at for at in asked})
        except TypeError as error:
            raise InputTypeError(f"positions must be integers: {error}") from error
    if wanted and not 0 <= wanted[0] <= wanted[-1] < total:
        raise InputTypeError(f"positions {wanted[0]} to {wanted[-1]} of a prompt of {total} tokens")
    return wanted


def only_series(reader: Reader, match: Match, name: str, layer: int | None, dtype: str | None) -> Series:
    """Return the series of a point; raises :class:`InputTypeError` if it was recorded in several dtypes."""
    if dtype is not None:
        return Series(name, layer, dtype)
    found = sorted({each for step in match.steps for each in series_of(reader, step.node, name, layer)})
    if len(found) > 1:
        raise InputTypeError(
            f"{found[0].point} was recorded as {', '.join(each.dtype for each in found)}",
            "choose one of them: dtype=, or --as",
        )
    return found[0] if found else Series(name, layer, "F32")


def rows_of(
    snapshot: Snapshot, match: Match, wanted: Sequence[Series], positions: Sequence[int] | None
) -> list[torch.Tensor]:
    """Return rows of a prompt as tensors of their own, of each series; raises as :meth:`PromptDB.activations` does."""
    copies: list[Copy] = []
    tensors = [_tensor(snapshot, match, series, positions, copies) for series in wanted]
    copy_all(copies)
    return tensors


def _tensor(
    snapshot: Snapshot, match: Match, series: Series, positions: Sequence[int] | None, copies: list[Copy]
) -> torch.Tensor:
    """Return the tensor of a series, and add what has to be copied into it to ``copies``."""
    import torch

    found, missing = pieces(snapshot, match, series, positions)
    if missing or not found:
        total = num_tokens(match.packed) if positions is None else len(positions)
        where = f", the first at {missing[0]}" if missing else ""
        raise NotRecordedError(
            f"{series}: {len(missing)} of {total} positions are not recorded{where}", "Recorder.run() records them"
        )
    shape = found[0].entry.row_shape
    if any(piece.entry.row_shape != shape for piece in found):
        raise CorruptDataError(f"rows of {series} have several shapes", "record them again after remove_activations()")
    if series.dtype not in _TORCH_NAMES:
        raise UnsupportedModelError(f"recorded activations of {series.dtype} cannot be read as a tensor")
    dtype, count = getattr(torch, _TORCH_NAMES[series.dtype]), sum(piece.num_rows for piece in found)
    _settle_warning()
    if found[0].entry.lengths is not None:
        fill = 0.0 if series.point == HookVariableNames.ATTN_PROBS else -math.inf
        return _padded(found, (count, shape[0], num_tokens(match.packed)), dtype, fill)
    width = found[0].entry.row_bytes
    memory = POOL.lease(count * width)
    target, at = memoryview(memory).cast("B"), 0
    for piece in found:
        data = piece.entry.data(piece.first, piece.num_rows)
        copies.append((target[at : at + len(data)], data))
        at += len(data)
    return torch.frombuffer(memory, dtype=dtype, count=at // dtype.itemsize).view(count, *shape)


def _padded(found: Sequence[Piece], shape: tuple[int, int, int], dtype: torch.dtype, fill: float) -> torch.Tensor:
    """Return ragged rows ``[heads, i + 1]`` as one tensor ``[rows, heads, tokens]``, with ``fill`` after each."""
    import torch

    memory = POOL.lease(math.prod(shape) * dtype.itemsize)
    target = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)
    at = 0
    for piece in found:
        for number in range(piece.first, piece.first + piece.num_rows):
            row = torch.frombuffer(piece.entry.data(number, 1), dtype=dtype).view(shape[1], -1)
            target[at, :, : row.shape[1]] = row
            target[at, :, row.shape[1] :] = fill
            at += 1
    return target


@cache
def _settle_warning() -> None:
    """Let torch say, once per process and to nobody, that views of the map must not be written; they never are."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)
