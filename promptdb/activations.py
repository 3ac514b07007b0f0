"""Recorded activations as bytes: rows of a tensor, one for each token, that go with the span that holds the tokens.

An entry stands under the span's node ID and its series: a point, a layer, a dtype. So it is found by the same walk as
keys and values, and one token of one prefix has each of its rows once. FORMAT.md is the specification.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from promptdb.blobs import DTYPE_BYTES, TensorSpec, TensorView, build_blob, parse_blob
from promptdb.errors import CorruptDataError, InputTypeError
from promptdb.format import ACTIVATIONS, CHECKSUM_BYTES, checksum
from promptdb.keys import DIGEST_BYTES, num_tokens, pack_tokens, unpack_tokens
from promptdb.tables import Reader

if TYPE_CHECKING:
    from promptdb.snapshot import Match, Snapshot

ROWS, OFFSETS = "rows", "offsets"

# Of a key of at most 511 bytes, what is left after the node ID.
_MAX_SERIES_BYTES = 511 - DIGEST_BYTES
_END = b"\0"


class Series(NamedTuple):
    """What was recorded: a point (one of the named ones, or a module's path), its layer or None, a dtype (``F32``)."""

    point: str
    layer: int | None
    dtype: str

    def key(self, node: bytes) -> bytes:
        """Return the key of the entry of a node."""
        return node + self.prefix(self.point, self.layer) + self.dtype.encode()

    @staticmethod
    def prefix(point: str, layer: int | None) -> bytes:
        """Return what follows the node ID in the keys of a point, whatever the dtype.

        Raises
        ------
        InputTypeError
            The name is too long for a key, or holds a zero byte.
        """
        name = point.encode()
        if _END in name or len(name) > _MAX_SERIES_BYTES - 32:
            raise InputTypeError(
                f"{point[:40]!r} cannot be recorded: its name has {len(name)} bytes", "hook its parent"
            )
        return name + _END + (b"" if layer is None else str(layer).encode()) + _END

    @classmethod
    def of_key(cls, key: bytes) -> Series:
        """Read the series of an entry's key; raises :class:`CorruptDataError`."""
        try:
            point, layer, dtype = key[DIGEST_BYTES:].decode().split("\0")
            series = cls(point, int(layer) if layer else None, dtype)
        except ValueError as error:
            raise CorruptDataError("a key of recorded activations cannot be read", "`promptdb verify --fix`") from error
        if not series.point or series.dtype not in DTYPE_BYTES or series.key(key[:DIGEST_BYTES]) != key:
            raise CorruptDataError("a key of recorded activations cannot be", "`promptdb verify --fix`")
        return series

    def __str__(self) -> str:
        where = self.point if self.layer is None else f"{self.point} of layer {self.layer}"
        return f"{where} ({self.dtype})"


@dataclass(frozen=True)
class Entry:
    """Rows of one span, in the order of its tokens.

    Attributes
    ----------
    rows : ``[m, ...]``; its memory may be the store's map, and dies with the transaction then.
    offsets : which tokens of the span the rows belong to, rising; None: its first m.
    """

    rows: TensorView
    offsets: Sequence[int] | None

    @property
    def num_rows(self) -> int:
        """How many tokens have a row."""
        return self.rows.shape[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return DTYPE_BYTES[self.rows.dtype] * prod(self.rows.shape[1:])

    def row_of(self, offset: int) -> int | None:
        """Return which row is that of a token of the span, or None if it has none."""
        if self.offsets is None:
            return offset if offset < self.num_rows else None
        return _find(self.offsets, offset)

    def tokens(self) -> Sequence[int]:
        """Return the tokens of the span that have a row, rising."""
        return range(self.num_rows) if self.offsets is None else self.offsets


def _find(rising: Sequence[int], value: int) -> int | None:
    at = bisect_left(rising, value)
    return at if at < len(rising) and rising[at] == value else None


def entry_specs(dtype: str, num_rows: int, row_shape: Sequence[int], offsets: Sequence[int]) -> list[TensorSpec]:
    """Return the tensors of an entry; the offsets are left out where they are those of the span's first tokens."""
    specs = [TensorSpec(ROWS, dtype, (num_rows, *row_shape))]
    if list(offsets) != list(range(num_rows)):
        specs.append(TensorSpec(OFFSETS, "U32", (num_rows,)))
    return specs


def read_entry(blob: bytes | bytearray | memoryview) -> Entry:
    """Read the blob of an entry, without its checksum.

    Raises
    ------
    CorruptDataError
        Tensors that are missing, or do not fit each other.
    """
    tensors = parse_blob(blob)
    rows, view = tensors.get(ROWS), tensors.get(OFFSETS)
    if rows is None or not rows.shape or not rows.shape[0]:
        raise CorruptDataError("an entry of recorded activations has no rows")
    if view is None:
        return Entry(rows, None)
    if view.dtype != "U32" or view.shape != rows.shape[:1]:
        raise CorruptDataError("an entry of recorded activations has offsets for other rows")
    offsets = unpack_tokens(view.data)
    if any(after <= before for before, after in pairwise(offsets)):
        raise CorruptDataError("an entry of recorded activations has offsets that do not rise")
    return Entry(rows, offsets)


def entry_of(snapshot: Snapshot, node: bytes, series: Series, span_tokens: int) -> Entry | None:
    """Return the rows of a span, or None if none are stored.

    Raises
    ------
    CorruptDataError
        The entry does not hold; ``node`` of the error names the span.
    """
    try:
        content = snapshot.activations(series.key(node))
        entry = None if content is None else read_entry(content)
        if entry is not None and (entry.rows.dtype != series.dtype or entry.tokens()[-1] >= span_tokens):
            raise CorruptDataError(f"recorded activations, {series}, are not those of the span")
    except CorruptDataError as error:
        error.node = node
        raise
    return entry


def merged(old: Entry, new: Entry) -> bytearray | None:
    """Return the blob of both entries' rows, those of ``old`` where both have one, or None if ``new`` adds nothing.

    Raises
    ------
    CorruptDataError
        Their rows differ in shape: they are not of one model.
    """
    if old.rows.shape[1:] != new.rows.shape[1:] or old.rows.dtype != new.rows.dtype:
        raise CorruptDataError(f"rows {new.rows.shape[1:]} for an entry of rows {old.rows.shape[1:]}")
    missing = [at for at in new.tokens() if old.row_of(at) is None]
    if not missing:
        return None
    tokens = sorted([*old.tokens(), *missing])
    width, data = old.row_bytes, bytearray()
    for token in tokens:
        row, entry = old.row_of(token), old
        if row is None:
            row, entry = new.row_of(token), new
        assert row is not None
        data += entry.rows.data[row * width : (row + 1) * width]
    specs = entry_specs(old.rows.dtype, len(tokens), old.rows.shape[1:], tokens)
    contents: list[bytes | memoryview] = [bytes(data), pack_tokens(tokens)]
    return build_blob(list(zip(specs, contents, strict=False)))


def pack_entry(key: bytes, blob: bytes | bytearray | memoryview) -> bytes:
    """Return the value to store under an entry's key."""
    return checksum(key, blob) + blob


def series_of(reader: Reader, node: bytes, point: str | None = None, layer: int | None = None) -> Iterator[Series]:
    """Yield what is recorded of a span: all of it, or of one point and layer."""
    start = node if point is None else node + Series.prefix(point, layer)
    for key in reader.keys(ACTIVATIONS, start):
        yield Series.of_key(key)


def blob_bytes(value_bytes: int) -> int:
    """Return the bytes of an entry without its checksum."""
    return value_bytes - CHECKSUM_BYTES


class Shard(NamedTuple):
    """Rows of one span: its node, how many tokens the span has, and how many of them have a row."""

    node: bytes
    span_tokens: int
    num_rows: int


@dataclass(frozen=True)
class Piece:
    """Rows ``[first, first + count)`` of an entry are those of the prompt's positions from ``start`` on."""

    start: int
    entry: Entry
    first: int
    count: int


def pieces(
    snapshot: Snapshot, match: Match, series: Series, positions: Sequence[int] | None
) -> tuple[list[Piece], list[int]]:
    """Find rows of a prompt.

    Parameters
    ----------
    positions : rising; None: all of the prompt, whether it is stored or not.

    Returns
    -------
    tuple
        Runs of rows that are stored, in order, and the positions of those that are not.

    Raises
    ------
    CorruptDataError
        An entry does not hold.
    """
    wanted: Sequence[int] = range(num_tokens(match.packed)) if positions is None else positions
    if wanted and wanted[-1] - wanted[0] == len(wanted) - 1:
        wanted = range(wanted[0], wanted[-1] + 1)
    found: list[Piece] = []
    missing: list[int] = []
    at = 0
    for step in match.steps:
        begin, at = at, bisect_left(wanted, step.end, at)
        if at == begin:
            continue
        here = wanted[begin:at]
        entry = entry_of(snapshot, step.node, series, step.span_tokens)
        if entry is None:
            missing += here
        elif entry.offsets is None and isinstance(here, range):  # the usual case, without looking at each token
            first = here[0] - step.start
            count = min(len(here), max(0, entry.num_rows - first))
            if count:
                found.append(Piece(here[0], entry, first, count))
            missing += here[count:]
        else:
            for position in here:
                row = entry.row_of(position - step.start)
                if row is None:
                    missing.append(position)
                else:
                    found.append(Piece(position, entry, row, 1))
    missing += wanted[at:]
    return found, missing
