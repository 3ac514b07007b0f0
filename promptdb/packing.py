"""Blobs made smaller without loss: bytes of equal significance together, then zstd. The only user of zstandard.

The highest bytes of floating-point numbers (sign and exponent) take few values, the lowest are noise. Next to each
other, as in a blob, they hide each other's pattern; apart, in planes, the high ones shrink by more than half. What
comes back is the blob to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import TYPE_CHECKING, Any

from promptdb.blobs import DTYPE_BYTES, TensorView, parse_blob
from promptdb.buffers import POOL
from promptdb.errors import CorruptDataError, MissingLibraryError

if TYPE_CHECKING:
    import numpy as np

Bytes = bytes | bytearray | memoryview

# As the length of a safetensors header it would be far beyond what is allowed: no blob begins so.
MAGIC = b"\x89PDBzst1"
MAX_EXPANSION = 64
"""How many times larger than itself a packed blob may say that its content is: what bounds the memory for reading."""
MAX_BYTES = 1 << 32
"""And how large in all; larger blobs are not packed."""

_SIZE = Struct("<Q")
_FRAME_AT = len(MAGIC) + _SIZE.size

# Higher levels look for repetitions, which numbers do not have: they are slower, and no smaller.
_LEVEL = 1
_MAX_WINDOW_BYTES = 8 << 20
# What packing must save, or the blob is stored as it is: it costs time at every read.
_LEAST_SHARE = 1 / 16
_LEAST_BYTES = 4096
# Content of a blob begins 48 bytes past a multiple of 64 (see blobs.py): so its numbers are aligned.
_PHASE_BYTES = 16


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingLibraryError(
            "the store is compressed with zstd, and the library zstandard is not installed",
            "pip install 'promptdb[compression]'",
        ) from error
    return zstandard


def check_available() -> None:
    """Raise :class:`~promptdb.errors.MissingLibraryError` unless blobs can be packed."""
    _zstandard()


def pack(blob: Bytes) -> Bytes:
    """Return a blob as it is to be stored: packed, if that saves a page and a sixteenth at least, or itself.

    Notes
    -----
    Some 250 MB/s for 16-bit numbers, 350 MB/s for 32-bit ones. Thread safe. Holds two copies of the blob for a moment.
    """
    view = memoryview(blob).cast("B")
    most = len(view) - max(_LEAST_BYTES, int(_LEAST_SHARE * len(view)))
    if most <= _FRAME_AT or len(view) > MAX_BYTES:
        return blob
    try:
        tensors = parse_blob(view)
    except CorruptDataError:  # no safetensors: the user's own bytes
        return blob
    planes = memoryview(POOL.lease(len(view))).cast("B")
    _move(view, planes, tensors, apart=True)
    frame: bytes = _zstandard().ZstdCompressor(level=_LEVEL).compress(planes)
    if not len(view) <= (_FRAME_AT + len(frame)) * MAX_EXPANSION or _FRAME_AT + len(frame) > most:
        return blob
    return b"".join((MAGIC, _SIZE.pack(len(view)), frame))


def is_packed(stored: Bytes) -> bool:
    """Return whether a stored blob is packed."""
    return bytes(memoryview(stored)[: len(MAGIC)]) == MAGIC


def unpack(stored: memoryview) -> memoryview:
    """Return the blob that was stored: ``stored`` itself unless it is packed.

    Raises
    ------
    CorruptDataError
        It is not what :func:`pack` makes. No more than twice the size that it gives is allocated, and no more than 64
        times its own size, or 4 GiB, is believed.
    MissingLibraryError
        It is packed, and zstandard is not installed.

    Notes
    -----
    Some 700 MB/s into pooled memory. Thread safe.
    """
    if not is_packed(stored):
        return stored
    size_bytes = _SIZE.unpack(stored[len(MAGIC) : _FRAME_AT])[0] if len(stored) > _FRAME_AT else 0
    if not 0 < size_bytes <= min(MAX_EXPANSION * len(stored), MAX_BYTES):
        raise CorruptDataError(f"a packed blob of {len(stored)} bytes says that it holds {size_bytes}")
    planes = memoryview(POOL.lease(size_bytes)).cast("B")
    _decompress(stored[_FRAME_AT:], planes)
    tensors = parse_blob(planes)
    blob = memoryview(POOL.lease(_PHASE_BYTES + size_bytes)).cast("B")[_PHASE_BYTES:]
    _move(planes, blob, tensors, apart=False)
    return blob


def _decompress(frame: memoryview, target: memoryview) -> None:
    """Decompress a frame that must fill ``target`` exactly."""
    zstandard = _zstandard()
    try:
        reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).stream_reader(frame)
        done = 0
        while done < len(target) and (count := reader.readinto(target[done:])):
            done += count
        is_exact = done == len(target) and not reader.read(1)
    except zstandard.ZstdError as error:
        raise CorruptDataError(f"a packed blob cannot be decompressed: {error}") from error
    if not is_exact:
        raise CorruptDataError(f"a packed blob holds another number of bytes than the {len(target)} that it says")


def _move(source: memoryview, target: memoryview, tensors: Mapping[str, TensorView], *, apart: bool) -> None:
    """Copy a blob, the bytes of its numbers from beside each other into planes (``apart``), or back."""
    import numpy

    total = sum(len(tensor.data) for tensor in tensors.values())
    at = len(source) - total
    target[:at] = source[:at]
    for tensor in tensors.values():  # in the order of their data, without gaps
        end, width = at + len(tensor.data), DTYPE_BYTES[tensor.dtype]
        if width == 1:
            target[at:end] = source[at:end]
        elif apart:
            _planes(numpy, target[at:end], width)[:] = _numbers(numpy, source[at:end], width).T
        else:
            planes, numbers = _planes(numpy, source[at:end], width), _numbers(numpy, target[at:end], width)
            for place in range(width):  # several times as fast as one transposed copy
                numbers[:, place] = planes[place]
        at = end


def _numbers(numpy: Any, data: memoryview, width: int) -> np.ndarray[Any, Any]:
    numbers: np.ndarray[Any, Any] = numpy.frombuffer(data, numpy.uint8).reshape(-1, width)
    return numbers


def _planes(numpy: Any, data: memoryview, width: int) -> np.ndarray[Any, Any]:
    planes: np.ndarray[Any, Any] = numpy.frombuffer(data, numpy.uint8).reshape(width, -1)
    return planes
