"""Recorded activations as bytes: rows of a tensor, one for each token, that go with the span that holds the tokens.

An entry stands under the span's node ID and its series: a point, a layer, a dtype. So it is found by the same walk as
keys and values, and one token of one prefix has each of its rows once. FORMAT.md is the specification.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from promptdb.blobs import DTYPE_BYTES, Blob, TensorSpec, TensorView, build_blob, parse_blob
from promptdb.errors import CorruptDataError, InputTypeError
from promptdb.format import ACTIVATIONS, CHECKSUM_BYTES, checksum
from promptdb.hook_points import POINTS
from promptdb.keys import DIGEST_BYTES, num_tokens, pack_tokens, unpack_tokens
from promptdb.tables import Reader

if TYPE_CHECKING:
    from promptdb.snapshot import Match, Snapshot

ROWS, OFFSETS, LENGTHS = "rows", "offsets", "lengths"

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
        return node + _suffix(self)

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


@lru_cache(maxsize=4096)  # a reading asks for each series at each of many spans
def _suffix(series: Series) -> bytes:
    return series.prefix(series.point, series.layer) + series.dtype.encode()


@dataclass(frozen=True)
class Entry:
    """Rows of one span, in the order of its tokens.

    Attributes
    ----------
    rows : ``[m, ...]``; its memory may be the store's map, and dies with the transaction then. Ragged rows are flat,
        one after the other.
    offsets : which tokens of the span the rows belong to, rising; None: its first m.
    lengths : of ragged rows, the tokens that each one looks at, ``[m]``: row i is ``[heads, lengths[i]]``.
    """

    rows: TensorView
    offsets: Sequence[int] | None
    lengths: Sequence[int] | None = None

    @property
    def num_rows(self) -> int:
        """How many tokens have a row."""
        return self.rows.shape[0] if self.lengths is None else len(self.lengths)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row; of ragged ones ``(heads, -1)``."""
        return self.rows.shape[1:] if self.lengths is None else (self.rows.shape[0] // sum(self.lengths), -1)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; raises :class:`InputTypeError` for ragged ones."""
        if self.lengths is not None:
            raise InputTypeError("rows as long as the text before them have no common size", "read them by prompt")
        return DTYPE_BYTES[self.rows.dtype] * prod(self.rows.shape[1:])

    @cached_property
    def _ends(self) -> list[int]:
        """Where each ragged row ends, in bytes."""
        width = DTYPE_BYTES[self.rows.dtype] * self.row_shape[0]
        return [width * end for end in accumulate(self.lengths or ())]

    def data(self, first: int, count: int) -> memoryview:
        """Return the bytes of ``count`` rows from number ``first`` on."""
        if self.lengths is None:
            width = self.row_bytes
            return self.rows.data[first * width : (first + count) * width]
        return self.rows.data[self._ends[first - 1] if first else 0 : self._ends[first + count - 1]]

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


def entry_specs(
    dtype: str, row_shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int] | None = None
) -> list[TensorSpec]:
    """Return the tensors of an entry; the offsets are left out where they are those of the span's first tokens."""
    count = len(offsets)
    shape = (count, *row_shape) if lengths is None else (row_shape[0] * sum(lengths),)
    specs = [TensorSpec(ROWS, dtype, shape)]
    if list(offsets) != list(range(count)):
        specs.append(TensorSpec(OFFSETS, "U32", (count,)))
    if lengths is not None:
        specs.append(TensorSpec(LENGTHS, "U32", (count,)))
    return specs


def side_data(specs: Sequence[TensorSpec], offsets: Sequence[int], lengths: Sequence[int] | None) -> list[bytes]:
    """Return the bytes of the tensors of an entry that come after its rows."""
    contents = {OFFSETS: offsets, LENGTHS: lengths or ()}
    return [pack_tokens(contents[spec.name]) for spec in specs[1:]]


def read_entry(blob: bytes | bytearray | memoryview) -> Entry:
    """Read the blob of an entry, without its checksum.

    Raises
    ------
    CorruptDataError
        Tensors that are missing, or do not fit each other.
    """
    tensors = parse_blob(blob)
    rows = tensors.get(ROWS)
    if rows is None or not rows.shape or not rows.shape[0]:
        raise CorruptDataError("an entry of recorded activations has no rows")
    lengths = _integers(tensors, LENGTHS)
    offsets = _integers(tensors, OFFSETS)
    count = rows.shape[0] if lengths is None else len(lengths)
    if offsets is not None and len(offsets) != count:
        raise CorruptDataError("an entry of recorded activations has offsets for other rows")
    if offsets is not None and any(after <= before for before, after in pairwise(offsets)):
        raise CorruptDataError("an entry of recorded activations has offsets that do not rise")
    if lengths is not None:
        _check_lengths(rows, range(count) if offsets is None else offsets, lengths)
    return Entry(rows, offsets, lengths)


def _integers(tensors: Mapping[str, TensorView], name: str) -> Sequence[int] | None:
    view = tensors.get(name)
    if view is None:
        return None
    if view.dtype != "U32" or len(view.shape) != 1 or not view.shape[0]:
        raise CorruptDataError(f"an entry of recorded activations has {name} that are no list of numbers")
    return unpack_tokens(view.data)


def _check_lengths(rows: TensorView, offsets: Sequence[int], lengths: Sequence[int]) -> None:
    """Raise :class:`CorruptDataError` unless the row of each token looks at it, and at all before it."""
    before = lengths[0] - 1 - offsets[0]
    if before < 0 or any(length - 1 - offset != before for offset, length in zip(offsets, lengths, strict=True)):
        raise CorruptDataError("an entry of recorded activations has rows that are not as long as the text before them")
    if len(rows.shape) != 1 or rows.shape[0] % sum(lengths):
        raise CorruptDataError("an entry of recorded activations has rows of other lengths than it says")


def entry_of(
    snapshot: Snapshot, node: bytes, series: Series, span_tokens: int, start: int | None = None
) -> Entry | None:
    """Return the rows of a span, or None if none are stored.

    Parameters
    ----------
    span_tokens, start : length of the span, and the position that it begins at; without that, ragged rows are refused.

    Raises
    ------
    CorruptDataError
        The entry does not hold; ``node`` of the error names the span.
    """
    try:
        content = snapshot.activations(series.key(node))
        entry = None if content is None else read_entry(content)
        if entry is not None and not is_of(entry, series, span_tokens, start):
            raise CorruptDataError(f"recorded activations, {series}, are not those of the span")
    except CorruptDataError as error:
        error.node = node
        raise
    return entry


def is_of(entry: Entry, series: Series, span_tokens: int, start: int | None) -> bool:
    """Return whether rows can be those of a series and a span; see :func:`entry_of`."""
    if entry.rows.dtype != series.dtype or entry.tokens()[-1] >= span_tokens:
        return False
    point = POINTS.get(series.point)
    if (point is not None and point.is_pairwise) != (entry.lengths is not None):
        return False
    return entry.lengths is None or entry.lengths[0] - 1 - entry.tokens()[0] == start


def merged(old: Entry, new: Entry) -> Blob | None:
    """Return the blob of both entries' rows, those of ``old`` where both have one, or None if ``new`` adds nothing.

    Raises
    ------
    CorruptDataError
        Their rows differ in shape: they are not of one model.
    """
    if old.row_shape != new.row_shape or old.rows.dtype != new.rows.dtype:
        raise CorruptDataError(f"rows {new.row_shape} for an entry of rows {old.row_shape}")
    missing = [at for at in new.tokens() if old.row_of(at) is None]
    if not missing:
        return None
    tokens = sorted([*old.tokens(), *missing])
    data, lengths = bytearray(), array("I")
    for token in tokens:
        row, entry = old.row_of(token), old
        if row is None:
            row, entry = new.row_of(token), new
        assert row is not None
        data += entry.data(row, 1)
        if entry.lengths is not None:
            lengths.append(entry.lengths[row])
    specs = entry_specs(old.rows.dtype, old.row_shape, tokens, lengths or None)
    contents: list[bytes | memoryview] = [memoryview(data), *side_data(specs, tokens, lengths)]
    return build_blob(list(zip(specs, contents, strict=True)))


def cut_entry(entry: Entry, first: int, count: int, start: int) -> Blob:
    """Return the blob of some rows of an entry, of those tokens of its span that are one from token ``start`` on."""
    tokens = [token - start for token in entry.tokens()[first : first + count]]
    lengths = None if entry.lengths is None else entry.lengths[first : first + count]
    specs = entry_specs(entry.rows.dtype, entry.row_shape, tokens, lengths)
    contents: list[bytes | memoryview] = [entry.data(first, count), *side_data(specs, tokens, lengths)]
    return build_blob(list(zip(specs, contents, strict=True)))


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


class Piece(NamedTuple):
    """Rows ``[first, first + num_rows)`` of an entry are those of the prompt's positions from ``start`` on."""

    start: int
    entry: Entry
    first: int
    num_rows: int


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
        entry = entry_of(snapshot, step.node, series, step.span_tokens, step.start)
        if entry is None:
            missing += here
        elif entry.offsets is None and isinstance(here, range):  # the usual case, without looking at each token
            first = here.start - step.start
            count = min(len(here), max(0, entry.num_rows - first))
            if count:
                found.append(Piece(here.start, entry, first, count))
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
