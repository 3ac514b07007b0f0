"""Safetensors bytes in memory that somebody else owns: headers are written and read here, tensors are not copied.

The format is that of the safetensors library (an 8-byte little-endian header length, a JSON header, then the data), and
the tests hold the two against each other. The library itself returns fresh ``bytes`` when it writes and copies every
tensor when it reads from memory; a store that reads straight from its memory map and writes straight into a reused
buffer cannot afford those copies (memory in first use costs page faults: about 1 GB/s against 5 to 10).
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from operator import itemgetter
from struct import Struct, unpack
from typing import Any, NamedTuple

from promptdb.buffers import POOL
from promptdb.errors import CorruptDataError

Blob = bytearray | memoryview

# From here on, fresh memory costs more than the pool.
_POOLED_BYTES = 1 << 20

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip

# A JSON header of many tiny values takes about 25 times its size while it is read.
MAX_HEADER_BYTES = 4 * 1024 * 1024
_REMEMBERED_BYTES = 4096
MAX_RANK = 16

_LENGTH = Struct("<Q")
# LMDB puts a value of several pages 16 bytes after the start of a page. Data that begins 48 bytes (modulo 64) into the
# blob is then aligned to a cache line in the map.
_ALIGNMENT_BYTES = 64
_DATA_PHASE_BYTES = 48


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (safetensors' name) and shape of a tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return DTYPE_BYTES[self.dtype] * prod(self.shape)


class TensorView(NamedTuple):
    """A tensor inside a blob. ``data`` is a view of the blob's memory and lives no longer than that."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def floats(self) -> array[float]:
        """Return the values of a floating-point tensor, flat and in order, without numpy or torch.

        Raises
        ------
        CorruptDataError
            The tensor does not hold F32, F16, BF16 or F64 numbers.
        """
        count = prod(self.shape)
        if self.dtype == "BF16":  # the upper half of an F32
            widened = bytearray(4 * count)
            raw = bytes(self.data)
            widened[2::4] = raw[0::2]
            widened[3::4] = raw[1::2]
            values = array("f")
            values.frombytes(widened)
            if sys.byteorder == "big":
                values.byteswap()
            return values
        codes = {"F32": "f", "F16": "f", "F64": "d"}
        if self.dtype not in codes:
            raise CorruptDataError(f"a tensor of {self.dtype} where floating-point numbers should be")
        if self.dtype == "F16":
            return array("f", unpack(f"<{count}e", self.data))
        values = array(codes[self.dtype])
        values.frombytes(self.data)
        if sys.byteorder == "big":
            values.byteswap()
        return values


@dataclass(frozen=True)
class BlobPlan:
    """Where each tensor goes in a blob to be filled: ``header`` first, then ``offsets_bytes[i]`` for tensor i."""

    header: bytes
    offsets_bytes: tuple[int, ...]
    size_bytes: int


def plan_blob(tensors: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> BlobPlan:
    """Lay out a blob of ``tensors``, in the order given.

    Returns
    -------
    BlobPlan
        The caller copies ``header`` to the start of a buffer of ``size_bytes`` and each tensor, C-contiguous and
        little-endian, to its offset.
    """
    return _plan(tuple(tensors), tuple((metadata or {}).items()))


@lru_cache(maxsize=256)  # a batch stores thousands of spans of few shapes
def _plan(tensors: tuple[TensorSpec, ...], metadata: tuple[tuple[str, str], ...]) -> BlobPlan:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in tensors:
        if tensor.name in entries or tensor.name == "__metadata__":
            raise ValueError(f"two tensors named {tensor.name!r}, or a reserved name")
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size_bytes],
        }
        position += tensor.size_bytes
    body = json.dumps(entries, separators=(",", ":")).encode()
    body += b" " * ((_DATA_PHASE_BYTES - _LENGTH.size - len(body)) % _ALIGNMENT_BYTES)
    start = _LENGTH.size + len(body)
    offsets = []
    total = start
    for tensor in tensors:
        offsets.append(total)
        total += tensor.size_bytes
    return BlobPlan(_LENGTH.pack(len(body)) + body, tuple(offsets), total)


def build_blob(
    tensors: Sequence[tuple[TensorSpec, bytes | memoryview]], metadata: Mapping[str, str] | None = None
) -> Blob:
    """Return a blob with a copy of tensors that are already bytes; a large one is in pooled memory."""
    plan = plan_blob([spec for spec, _ in tensors], metadata)
    is_large = plan.size_bytes >= _POOLED_BYTES
    blob = memoryview(POOL.lease(plan.size_bytes)).cast("B") if is_large else bytearray(plan.size_bytes)
    blob[: len(plan.header)] = plan.header
    for (spec, data), offset in zip(tensors, plan.offsets_bytes, strict=True):
        if len(data) != spec.size_bytes:
            raise ValueError(f"{spec.name}: {len(data)} bytes for {spec.dtype} {spec.shape}")
        blob[offset : offset + spec.size_bytes] = data
    return blob


def parse_blob(blob: bytes | bytearray | memoryview) -> dict[str, TensorView]:
    """Read the header of a blob and return views of its tensors. Copies no tensor; trusts nothing.

    Raises
    ------
    CorruptDataError
        Not safetensors: lengths, JSON, dtypes, shapes or offsets that do not fit the bytes at hand exactly.
    """
    view = memoryview(blob)
    if len(view) < _LENGTH.size:
        raise CorruptDataError(f"a blob of {len(view)} bytes")
    (header_bytes,) = _LENGTH.unpack(view[: _LENGTH.size])
    start = _LENGTH.size + header_bytes
    if header_bytes > MAX_HEADER_BYTES or start > len(view):
        raise CorruptDataError(f"a blob of {len(view)} bytes with a header of {header_bytes}")
    header = bytes(view[_LENGTH.size : start])
    # Spans of one length have the same header: a batch reads thousands of them.
    entries = _parsed(header) if len(header) <= _REMEMBERED_BYTES else _parsed.__wrapped__(header)
    tensors: dict[str, TensorView] = {}
    expected = 0
    for name, dtype, shape, begin, end in entries:
        expected = end
        if start + end > len(view):
            raise CorruptDataError(f"tensor {name!r} ends beyond the blob")
        tensors[name] = TensorView(dtype, shape, view[start + begin : start + end])
    if start + expected != len(view):
        raise CorruptDataError(f"{len(view) - start - expected} bytes of the blob belong to no tensor")
    return tensors


@lru_cache(maxsize=512)
def _parsed(header: bytes) -> tuple[tuple[str, str, tuple[int, ...], int, int], ...]:
    """Return name, dtype, shape and place of a header's tensors, in the order of their data, which has no gaps."""
    try:
        entries = json.loads(header.decode())
    except (ValueError, RecursionError) as error:
        raise CorruptDataError(f"the blob's header is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise CorruptDataError("the blob's header is not an object")
    entries.pop("__metadata__", None)
    expected = 0
    checked = [(name, *_checked_entry(name, entry)) for name, entry in entries.items()]
    for name, dtype, shape, begin, end in (found := sorted(checked, key=itemgetter(3, 4))):
        if begin != expected or end - begin != DTYPE_BYTES[dtype] * prod(shape):
            raise CorruptDataError(f"tensor {name!r} is {dtype} {shape} at [{begin}, {end}), after {expected} bytes")
        expected = end
    return tuple(found)


def _checked_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [begin, end, *shape]
        sound = (
            dtype in DTYPE_BYTES
            and type(shape) is list
            and len(shape) <= MAX_RANK
            and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptDataError(f"tensor {name!r} has no readable entry in the header") from error
    if not sound:
        raise CorruptDataError(f"tensor {name!r} has dtype, shape or offsets that cannot be")
    return dtype, tuple(shape), begin, end
