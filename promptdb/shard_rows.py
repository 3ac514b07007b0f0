"""Rows of recorded activations as an export reads them: span by span, each from one look at the store."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blake3 import blake3

from promptdb.activations import Entry, Series, entry_of
from promptdb.errors import NotRecordedError, StoreError
from promptdb.keys import Root, unpack_tokens

if TYPE_CHECKING:
    from promptdb.db import PromptDB
    from promptdb.format import NodeRecord
    from promptdb.snapshot import Snapshot


WIDENED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "float32"}
"""What rows are in files that know no bfloat16, by dtype: names that arrow and numpy share."""


class SpanRows(NamedTuple):
    """Rows of one span, with the token and the position in its prompt of each.

    ``data`` is memory of the store's map: it lives until the next span is asked for.
    """

    node: bytes
    token_ids: array[int]
    positions: array[int]
    data: memoryview

    @property
    def num_rows(self) -> int:
        """How many tokens have a row."""
        return len(self.positions)


class ShardFile(NamedTuple):
    """A file that was written: its name in the directory, size, digest (hex), and rows, where a file has whole ones."""

    name: str
    size_bytes: int
    blake3: str
    num_rows: int | None = None


class Written(NamedTuple):
    """What a writer has made."""

    num_rows: int
    files: list[ShardFile]


@dataclass(frozen=True)
class Source:
    """What is exported: rows of one series of one identity.

    Attributes
    ----------
    nodes : spans, in the order in which they are written.
    """

    db: PromptDB
    root: Root
    series: Series
    nodes: Sequence[bytes]

    def row_shape(self) -> tuple[int, ...]:
        """Return the shape of one row; ``()`` if there are no spans."""
        if not self.nodes:
            return ()
        with self.db.read() as snapshot:
            return self.entry(snapshot, self.nodes[0])[0].rows.shape[1:]

    def describe(self) -> dict[str, Any]:
        """Return what the files say of themselves, for JSON."""
        return {
            "point": self.series.point,
            "layer": self.series.layer,
            "dtype": self.series.dtype,
            "row_shape": list(self.row_shape()),
            **asdict(self.root),
        }

    def entry(self, snapshot: Snapshot, node: bytes) -> tuple[Entry, NodeRecord]:
        """Return rows and record of a span; raises :class:`NotRecordedError` if they are gone."""
        record = snapshot.record(node)
        entry = None if record is None else entry_of(snapshot, node, self.series, record.num_tokens)
        if entry is None or record is None:
            raise NotRecordedError(f"{self.series} of span {node[:8].hex()} is not stored any more", "export again")
        return entry, record

    def spans(self, snapshot: Snapshot, nodes: Sequence[bytes], row_shape: tuple[int, ...]) -> Iterator[SpanRows]:
        """Yield the rows of spans, seen through one snapshot."""
        for node in nodes:
            entry, record = self.entry(snapshot, node)
            if entry.rows.shape[1:] != row_shape:
                raise StoreError(f"rows of {self.series} have several shapes", "record them again")
            own, offsets = unpack_tokens(record.span), entry.tokens()
            yield SpanRows(
                node,
                array("I", (own[offset] for offset in offsets)),
                array("I", (record.start + offset for offset in offsets)),
                entry.rows.data,
            )

    def all_spans(self) -> Iterator[SpanRows]:
        """Yield the rows of all spans, each seen through a snapshot of its own: none is held for long."""
        row_shape = self.row_shape()
        for node in self.nodes:
            with self.db.read() as snapshot:
                yield from self.spans(snapshot, (node,), row_shape)


def widened(data: memoryview, dtype: str) -> bytes | bytearray | memoryview:
    """Return rows as numbers that every library knows: bfloat16 becomes float32, which holds it exactly."""
    if dtype != "BF16":
        return data
    wide = bytearray(2 * len(data))
    wide[2::4], wide[3::4] = data[0::2], data[1::2]
    return wide


def finished(path: Path, name: str, num_rows: int | None = None) -> ShardFile:
    """Sync a file to the disk, and return what the manifest says of it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return ShardFile(name, path.stat().st_size, blake3().update_mmap(path).hexdigest(), num_rows)
