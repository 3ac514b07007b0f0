"""Recorded activations as Parquet files, for pandas, polars, DuckDB and their like. The only user of pyarrow."""

from __future__ import annotations

import json
from array import array
from math import prod
from pathlib import Path
from typing import Any

from promptdb.blobs import DTYPE_BYTES
from promptdb.errors import MissingLibraryError
from promptdb.shard_rows import WIDENED, ShardFile, Source, SpanRows, Written, finished, widened

DEFAULT_SHARD_BYTES = 256 << 20
_GROUP_BYTES = 16 << 20
"""Rows that are in memory at once, and then in one row group."""


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingLibraryError(
            "Parquet files are written by pyarrow, which is not installed", "pip install 'promptdb[parquet]'"
        ) from error
    return pyarrow


def write_parquet(source: Source, target: Path, shard_bytes: int) -> Written:
    """Write ``rows-00000.parquet`` and so on, a row for each recorded row.

    Columns: ``token_id`` and ``position`` (uint32), ``span`` (text: node ID, hex), ``activation`` (a list of fixed
    size; rows of several dimensions lie flat). The schema's metadata has ``promptdb``: JSON with point, layer, dtype,
    shape of a row, and identity. A file holds whole spans, and at least one.
    """
    pa = _pyarrow()
    described = source.describe()
    width = prod(described["row_shape"])
    schema = pa.schema(
        [
            pa.field("token_id", pa.uint32(), nullable=False),
            pa.field("position", pa.uint32(), nullable=False),
            pa.field("span", pa.string(), nullable=False),
            pa.field("activation", pa.list_(_number(pa, source), width), nullable=False),
        ],
        metadata={"promptdb": json.dumps(described)},
    )
    file: _File | None = None
    files: list[ShardFile] = []
    for span in source.all_spans():
        if file is not None and file.size_bytes + len(span.data) > shard_bytes:
            files.append(file.end())
            file = None
        if file is None:
            file = _File(pa, schema, source, target / f"rows-{len(files):05}.parquet", width)
        file.add(span)
    if file is not None:
        files.append(file.end())
    return Written(sum(each.num_rows or 0 for each in files), files)


def _number(pa: Any, source: Source) -> Any:
    return getattr(pa, WIDENED[source.series.dtype])()


class _File:
    """One file while it is written: rows are collected, and written a row group at a time."""

    def __init__(self, pa: Any, schema: Any, source: Source, path: Path, width: int) -> None:
        self._pa, self._schema, self._path, self._width = pa, schema, path, width
        self._dtype = source.series.dtype
        self._number = _number(pa, source)
        self._part = path.with_name(path.name + ".part")
        self._writer = pa.parquet.ParquetWriter(self._part, schema, compression="zstd", use_dictionary=["span"])
        self.num_rows = self.size_bytes = 0
        self._clear()

    def _clear(self) -> None:
        self._rows = bytearray()
        self._token_ids, self._positions = array("I"), array("I")
        self._spans: list[str] = []

    def add(self, span: SpanRows) -> None:
        row_bytes = self._width * DTYPE_BYTES[self._dtype]
        step = max(1, _GROUP_BYTES // max(1, row_bytes))
        for first in range(0, span.num_rows, step):  # a span may be larger than a group
            last = min(first + step, span.num_rows)
            self._rows += widened(span.data[first * row_bytes : last * row_bytes], self._dtype)
            self._token_ids += span.token_ids[first:last]
            self._positions += span.positions[first:last]
            self._spans += [span.node.hex()] * (last - first)
            if len(self._rows) >= _GROUP_BYTES:
                self._flush()
        self.num_rows += span.num_rows
        self.size_bytes += len(span.data)

    def _flush(self) -> None:
        if not self._positions:
            return
        pa, count = self._pa, len(self._positions)
        numbers = pa.Array.from_buffers(self._number, count * self._width, [None, pa.py_buffer(self._rows)])
        columns = [
            pa.Array.from_buffers(pa.uint32(), count, [None, pa.py_buffer(self._token_ids)]),
            pa.Array.from_buffers(pa.uint32(), count, [None, pa.py_buffer(self._positions)]),
            pa.array(self._spans, pa.string()),
            pa.FixedSizeListArray.from_arrays(numbers, type=self._schema.field("activation").type),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._clear()

    def end(self) -> ShardFile:
        self._flush()
        self._writer.close()
        self._part.replace(self._path)
        return finished(self._path, self._path.name, self.num_rows)
