"""Recorded activations as a Zarr group (format 3). The only user of zarr."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from promptdb.blobs import DTYPE_BYTES
from promptdb.errors import MissingLibraryError, StoreError
from promptdb.shard_rows import WIDENED, Source, Written, finished, widened

DEFAULT_SHARD_BYTES = 16 << 20
"""Of a chunk, which is a file of its own."""
GROUP = "activations.zarr"

_NODE_BYTES = 32


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise MissingLibraryError(
            "Zarr groups are written by zarr, which is not installed", "pip install 'promptdb[zarr]'"
        ) from error
    return zarr


def write_zarr(source: Source, target: Path, shard_bytes: int) -> Written:
    """Write the group ``activations.zarr``: ``rows`` ``[m, ...]``, ``token_ids`` and ``positions`` ``[m]``, ``spans``
    ``[m, 32]`` (node IDs).

    The group's attribute ``promptdb`` has point, layer, dtype, shape of a row, and identity. A chunk has as many rows
    as ``shard_bytes`` hold, and at least one; one chunk is in memory at a time.
    """
    if (target / GROUP).exists():
        raise StoreError(f"{target / GROUP} is there already", "choose another directory, or remove it")
    described = source.describe()
    row_shape = tuple(described["row_shape"])
    dtype = WIDENED[source.series.dtype]
    row_bytes = prod(row_shape) * DTYPE_BYTES[source.series.dtype]
    chunk = max(1, shard_bytes // max(1, row_bytes))
    group = _zarr().create_group(target / GROUP, attributes={"promptdb": described})
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "rows": (dtype, row_shape),
        "token_ids": ("uint32", ()),
        "positions": ("uint32", ()),
        "spans": ("uint8", (_NODE_BYTES,)),
    }
    arrays = {
        name: group.create_array(name, shape=(0, *inner), chunks=(chunk, *inner), dtype=kind)
        for name, (kind, inner) in shapes.items()
    }
    total = 0
    for columns in _chunks(source, chunk, row_bytes):
        count = len(columns["positions"]) // 4
        for name, data in columns.items():
            _append(arrays[name], total, count, data, *shapes[name])
        total += count
    paths = [path for path in sorted((target / GROUP).rglob("*")) if path.is_file()]
    return Written(total, [finished(path, str(path.relative_to(target))) for path in paths])


def _append(to: Any, total: int, count: int, data: Any, dtype: str, inner: tuple[int, ...]) -> None:
    import numpy

    to.resize((total + count, *inner))
    to[total:] = numpy.frombuffer(data, dtype).reshape(count, *inner)


def _chunks(source: Source, chunk: int, row_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield the columns of ``chunk`` rows at a time, as bytes; the last time, of those that are left."""
    rows, spans = bytearray(), bytearray()
    token_ids, positions = array("I"), array("I")
    for span in source.all_spans():
        first = 0
        while first < span.num_rows:
            last = min(span.num_rows, first + chunk - len(positions))
            rows += widened(span.data[first * row_bytes : last * row_bytes], source.series.dtype)
            token_ids += span.token_ids[first:last]
            positions += span.positions[first:last]
            spans += span.node * (last - first)
            first = last
            if len(positions) == chunk:
                yield _columns(rows, token_ids, positions, spans)
                rows, spans = bytearray(), bytearray()
                token_ids, positions = array("I"), array("I")
    if positions:
        yield _columns(rows, token_ids, positions, spans)


def _columns(rows: bytearray, token_ids: array[int], positions: array[int], spans: bytearray) -> dict[str, Any]:
    return {"rows": rows, "token_ids": token_ids.tobytes(), "positions": positions.tobytes(), "spans": spans}
