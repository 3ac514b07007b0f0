"""How long recorded rows are: a look at a prompt's activations without a model and without torch. Needs numpy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from promptdb.activations import Entry, Series, pieces, series_of
from promptdb.errors import InputTypeError, NotRecordedError
from promptdb.keys import num_tokens

if TYPE_CHECKING:
    import numpy as np

    from promptdb.snapshot import Match, Snapshot

_NUMPY = {"F64": "float64", "F32": "float32", "F16": "float16"}


@dataclass(frozen=True)
class Norms:
    """Euclidean norms of a prompt's rows at one point.

    Attributes
    ----------
    series : by layer, rising; of a point without layers, one.
    values : ``[len(series)][n]``; NaN where the row is not recorded.
    """

    series: tuple[Series, ...]
    values: tuple[tuple[float, ...], ...]


def norms_of(
    snapshot: Snapshot, match: Match, point: str, layers: Iterable[int] | None = None, dtype: str | None = None
) -> Norms:
    """Return the norms of what is recorded of a prompt at a point; see :meth:`PromptDB.activation_norms`."""
    recorded = {each for step in match.steps for each in series_of(snapshot.reader, step.node) if each.point == point}
    if layers is not None:
        wanted = set(layers)
        missing = sorted(wanted - {each.layer for each in recorded if each.layer is not None})
        if missing:
            raise NotRecordedError(
                f"nothing is recorded of {point} of layer {missing[0]} for this prompt", "`promptdb record` records it"
            )
        recorded = {each for each in recorded if each.layer in wanted}
    dtypes = sorted({each.dtype for each in recorded} if dtype is None else {dtype})
    if len(dtypes) > 1:
        raise InputTypeError(f"{point} was recorded as {', '.join(dtypes)}", "choose one of them: dtype=, or --as")
    chosen = tuple(sorted((each for each in recorded if each.dtype in dtypes), key=lambda each: each.layer or 0))
    if not chosen:
        raise NotRecordedError(f"nothing is recorded of {point} for this prompt", "`promptdb record` records it")
    return Norms(chosen, tuple(_norms(snapshot, match, each) for each in chosen))


def _norms(snapshot: Snapshot, match: Match, series: Series) -> tuple[float, ...]:
    values = [math.nan] * num_tokens(match.packed)
    for piece in pieces(snapshot, match, series, None)[0]:
        values[piece.start : piece.start + piece.num_rows] = _lengths(piece.entry, piece.first, piece.num_rows)
    return tuple(values)


def _lengths(entry: Entry, first: int, count: int) -> Sequence[float]:
    import numpy

    width = entry.row_bytes
    data = entry.rows.data[first * width : (first + count) * width]
    if entry.rows.dtype == "BF16":  # the upper half of an F32
        rows: np.ndarray = (numpy.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        rows = numpy.frombuffer(data, _NUMPY[entry.rows.dtype])
    rows = rows.reshape(count, prod(entry.rows.shape[1:])).astype("float64")
    found: list[float] = numpy.sqrt((rows * rows).sum(axis=1)).tolist()
    return found
