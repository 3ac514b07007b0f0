"""The bytes of an archive: a preamble, then frames, each with its length and checksum. FORMAT.md specifies them.

Written and read front to back, so that an archive can go through a pipe. The reader trusts nothing: a frame of a kind
that its caller does not expect, or longer than its caller allows, is refused before its body is read, and a body is
read piece by piece, so that memory is only taken for bytes that really came.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from struct import Struct
from typing import BinaryIO

from blake3 import blake3
from xxhash import xxh3_128

from promptdb.errors import CorruptDataError, FormatVersionError, StoreError
from promptdb.format import CHECKSUM_BYTES
from promptdb.version import __version__

# A byte that is no text, both kinds of line ends and an end of file for terminals: what mangles those is noticed.
MAGIC = b"\x89promptdb\r\n\x1a"
ARCHIVE_VERSION = 2
VERSION_WITHOUT_ACTIVATIONS = 1
NO_ARCHIVE = "this is no promptdb archive"

MANIFEST = b"MANI"
MODEL = b"MODL"
TOKENIZER = b"TOKN"
ROOT = b"ROOT"
PATH = b"PATH"
NODE = b"NODE"
BLOB = b"BLOB"
RECORDED = b"ACTV"
LOGITS_AFTER = b"LOGI"
DONE = b"DONE"

# Keys that records without a digest of their own are packed under.
MANIFEST_KEY = b"manifest"
DONE_KEY = b"done"

_PREAMBLE = Struct("<12sI")
_LABEL = Struct("<4sQ")
# As much memory is taken before any byte is read, and then as much again as has come.
_PIECE_BYTES = 4 << 20

Bytes = bytes | bytearray | memoryview


class FrameWriter:
    """Writes an archive to a stream, frame by frame. Not thread safe; does not close the stream.

    Parameters
    ----------
    version : of the archive: the lowest that has what will be written.

    Raises
    ------
    OSError
        What the stream raises.
    """

    def __init__(self, stream: BinaryIO, version: int = VERSION_WITHOUT_ACTIVATIONS) -> None:
        self._stream = stream
        self._digest = blake3()
        self.num_frames = 0
        self.num_bytes = 0
        self.version = version
        self._write(_PREAMBLE.pack(MAGIC, version))

    def _write(self, data: Bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)

    def write(self, kind: bytes, *parts: Bytes) -> None:
        """Write one frame; its body is the parts, one after the other."""
        label = _LABEL.pack(kind, sum(map(len, parts)))
        check = xxh3_128(label, seed=self.num_frames)
        for part in parts:
            check.update(part)
        self._write(label + check.digest())
        for part in parts:
            self._write(part)
        self.num_frames += 1

    def digest(self) -> bytes:
        """Return the digest of all that was written so far, 32 bytes."""
        return bytes(self._digest.digest())


class FrameReader:
    """Reads an archive from a stream, frame by frame, and trusts nothing in it. Not thread safe.

    Parameters
    ----------
    newest : the newest version that is accepted.

    Raises
    ------
    CorruptDataError
        The stream is no archive, or a frame is cut off, too long, of an unexpected kind, or fails its checksum.
    FormatVersionError
        The archive was written by a newer version.
    StoreError
        The stream cannot be read.
    """

    def __init__(self, stream: BinaryIO, newest: int = ARCHIVE_VERSION) -> None:
        self._stream = stream
        self._digest = blake3()
        self.num_frames = 0
        self.num_bytes = 0
        preamble = self._take(_PREAMBLE.size)
        if len(preamble) < _PREAMBLE.size or not preamble.startswith(MAGIC):
            raise CorruptDataError(NO_ARCHIVE, "`promptdb export` writes one")
        (_, version) = _PREAMBLE.unpack(preamble)
        if version > newest:
            raise FormatVersionError(
                f"the archive has version {version}; this promptdb {__version__} reads up to {newest}",
                "upgrade promptdb",
            )
        if version < 1:
            raise CorruptDataError(f"the archive has version {version}")
        self.version = version
        self._digest.update(preamble)

    def _take(self, size: int) -> bytearray:
        """Read ``size`` bytes; fewer at the end of the stream."""
        taken = bytearray(min(size, _PIECE_BYTES))
        filled = 0
        while filled < size:
            if filled == len(taken):
                taken.extend(bytes(min(len(taken), size - len(taken))))
            with memoryview(taken) as view, view[filled:] as free:
                number = self._read_into(free)
            if not number:
                break
            filled += number
        del taken[filled:]
        self.num_bytes += filled
        return taken

    def _read_into(self, free: memoryview) -> int:
        readinto: Callable[[memoryview], int | None] = self._stream.readinto  # type: ignore[attr-defined]
        try:
            number = readinto(free)
        except OSError as error:
            raise StoreError(f"the archive cannot be read: {error}") from error
        if number is None:
            raise StoreError("the archive cannot be read: its stream does not wait for data", "make it blocking")
        return number

    def read(self, limits: Mapping[bytes, int]) -> tuple[bytes, bytearray, bytes]:
        """Read one frame.

        Parameters
        ----------
        limits : which kinds of frames may come here, and the longest body of each in bytes.

        Returns
        -------
        tuple
            Kind, body, and the digest of everything before the frame (of ``DONE`` only; otherwise empty).
        """
        label = self._take(_LABEL.size)
        check = self._take(CHECKSUM_BYTES)
        if len(check) < CHECKSUM_BYTES:
            raise CorruptDataError("it ends too early")
        kind, size = _LABEL.unpack(label)
        # What is damaged most often is the whole frame, so this says no more than that it cannot be.
        if kind not in limits:
            raise CorruptDataError(f"a frame of kind {kind!r}, where {_names(limits)} should be")
        if size > limits[kind]:
            raise CorruptDataError(f"a {kind.decode()} frame of {size:,} bytes, where {limits[kind]:,} may be")
        body = self._take(size)
        if len(body) < size:
            raise CorruptDataError(f"it ends in the middle of a {kind.decode()} frame")
        computed = xxh3_128(label, seed=self.num_frames)
        computed.update(body)
        if computed.digest() != check:
            raise CorruptDataError(f"the checksum of a {kind.decode()} frame does not hold")
        before = bytes(self._digest.digest()) if kind == DONE else b""
        for part in (label, check, body):
            self._digest.update(part)
        self.num_frames += 1
        return kind, body, before

    def at_end(self) -> bool:
        """Return whether nothing follows."""
        return not self._take(1)


def starts_like_an_archive(stream: BinaryIO) -> bool:
    """Return whether what comes next in a stream may be an archive, without taking it. True if it cannot be told."""
    peek = getattr(stream, "peek", None)
    if peek is None:
        return True
    head = peek(len(MAGIC))[: len(MAGIC)]  # of a pipe, it may be the first few bytes
    return bool(head) and MAGIC.startswith(head)


def _names(kinds: Mapping[bytes, int]) -> str:
    return " or ".join(kind.decode() for kind in kinds)
