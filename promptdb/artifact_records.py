"""Artifacts as bytes: a record, and a blob with the numbers. FORMAT.md is the specification."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from promptdb.blobs import MAX_HEADER_BYTES, MAX_RANK, TensorSpec, TensorView, parse_blob, plan_blob
from promptdb.errors import CorruptDataError, InputTypeError
from promptdb.format import ARTIFACTS, checksum, pack_record, unpack_record
from promptdb.packing import unpack
from promptdb.plots import Plot
from promptdb.tables import Reader

RECORD, BLOB = b"r", b"b"
LONGEST_NAME_BYTES = 400
MAX_BLOB_BYTES = 1 << 31
MAX_TEXT_BYTES = 16 << 20
_HEADER_ROOM = 64

NUMBER, TEXT = "number", "text"
_COLUMN_DTYPES = {NUMBER: ("F64", "I64", "BOOL"), TEXT: ("I64",)}


def record_key(name: str) -> bytes:
    """Return where an artifact's record stands."""
    return RECORD + name.encode()


def blob_key(name: str) -> bytes:
    """Return where an artifact's blob stands."""
    return BLOB + name.encode()


@dataclass(frozen=True)
class ArtifactRecord:
    """What is known of an artifact without its numbers.

    Attributes
    ----------
    name : under which it is kept.
    created_unix_s : when it was saved.
    created_by : version of promptdb.
    config : anything that JSON has, as it was given.
    plot : what its picture shows, if there is one.
    notes : text.
    key : of a result that is reused, the digest of all that it was made from (hex); empty otherwise.
    columns : names and kinds (``"number"``, ``"text"``) of the table's columns, in order.
    tensors : names of the tensors, in order.
    blob_bytes : size of the blob as it is stored; 0 if there is none.
    """

    name: str
    created_unix_s: float
    created_by: str = ""
    config: Any = None
    plot: Plot | None = None
    notes: str = ""
    key: str = ""
    columns: tuple[tuple[str, str], ...] = ()
    tensors: tuple[str, ...] = ()
    blob_bytes: int = 0
    blob_checksum: bytes = field(default=b"", repr=False)

    def pack(self) -> bytes:
        """Return the bytes to store under :func:`record_key`."""
        return pack_record(
            record_key(self.name),
            {
                "name": self.name,
                "created_unix_s": self.created_unix_s,
                "created_by": self.created_by,
                "config": json.dumps(self.config),
                "plot": "" if self.plot is None else json.dumps(self.plot.as_fields()),
                "notes": self.notes,
                "key": self.key,
                "columns": [list(each) for each in self.columns],
                "tensors": list(self.tensors),
                "blob": [self.blob_bytes, self.blob_checksum],
            },
        )

    @classmethod
    def unpack(cls, key: bytes, data: bytes | memoryview) -> ArtifactRecord:
        """Read the record under a key; raises :class:`CorruptDataError`. Unknown fields are ignored."""
        fields = unpack_record(key, data)
        try:
            size_bytes, digest = fields["blob"]
            record = cls(
                fields["name"],
                fields["created_unix_s"],
                fields["created_by"],
                json.loads(fields["config"]),
                Plot.of(json.loads(fields["plot"])) if fields["plot"] else None,
                fields["notes"],
                fields["key"],
                tuple((name, kind) for name, kind in fields["columns"]),
                tuple(fields["tensors"]),
                size_bytes,
                digest,
            )
            sound = (
                type(record.name) is str
                and record_key(record.name) == key
                and type(record.created_unix_s) is float
                and all(type(each) is str for each in (record.created_by, record.notes, record.key, *record.tensors))
                and all(type(name) is str and kind in (NUMBER, TEXT) for name, kind in record.columns)
                and type(size_bytes) is int
                and size_bytes >= 0
                and type(digest) is bytes
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CorruptDataError(f"the record of artifact {key[1:40]!r} lacks or garbles a field: {error}") from error
        if not sound:
            raise CorruptDataError(f"the record of artifact {key[1:40]!r} has a field that cannot be")
        return record


# Names in the blob


def tensor_name(name: str) -> str:
    """Return the name in the blob of a tensor."""
    return f"t.{name}"


def column_name(number: int) -> str:
    """Return the name in the blob of a column: of numbers ``[rows]``, or of the UTF-8 of all texts."""
    return f"c.{number}"


def ends_name(number: int) -> str:
    """Return the name in the blob of where each text of a column ends, in bytes, I64 ``[rows]``."""
    return f"c.{number}.ends"


def build(tensors: Sequence[tuple[TensorSpec, bytes | memoryview]]) -> bytearray:
    """Return the blob of an artifact.

    Raises
    ------
    InputTypeError
        More, or larger, than what an artifact holds.
    """
    total = sum(spec.size_bytes for spec, _ in tensors)
    names = sum(_HEADER_ROOM + len(json.dumps(spec.name)) + 20 * len(spec.shape) for spec, _ in tensors)
    if total > MAX_BLOB_BYTES or names + _HEADER_ROOM > MAX_HEADER_BYTES:
        raise InputTypeError(
            f"{len(tensors):,} tensors of {total:,} bytes are too much for one artifact", "keep them in files"
        )
    if any(len(spec.shape) > MAX_RANK for spec, _ in tensors):
        raise InputTypeError(f"a tensor of more than {MAX_RANK} dimensions")
    plan = plan_blob([spec for spec, _ in tensors])
    blob = bytearray(plan.size_bytes)
    blob[: len(plan.header)] = plan.header
    for (spec, data), at in zip(tensors, plan.offsets_bytes, strict=True):
        blob[at : at + spec.size_bytes] = data
    return blob


def read_blob(record: ArtifactRecord, data: memoryview | None) -> memoryview:
    """Return the blob of an artifact from the value that is stored, of which it may be the memory.

    Raises
    ------
    CorruptDataError
        Size, checksum or content are not what the record says.
    """
    if not record.blob_bytes:
        return memoryview(b"")
    if data is None or len(data) != record.blob_bytes:
        raise CorruptDataError(f"the numbers of artifact {record.name!r} are missing", "restore the store from a copy")
    if checksum(blob_key(record.name), data) != record.blob_checksum:
        raise CorruptDataError(
            f"the checksum of the numbers of artifact {record.name!r} does not hold", "restore the store from a copy"
        )
    blob = unpack(data)
    _check(record, parse_blob(blob))
    return blob


def _check(record: ArtifactRecord, found: Mapping[str, TensorView]) -> None:
    wanted = {tensor_name(name) for name in record.tensors}
    lengths = set()
    for number, (_, kind) in enumerate(record.columns):
        name = column_name(number) if kind == NUMBER else ends_name(number)
        wanted |= {name, column_name(number)}
        view = found.get(name)
        is_sound = view is not None and len(view.shape) == 1 and view.dtype in _COLUMN_DTYPES[kind]
        lengths.add(view.shape[0] if view is not None and is_sound else None)
    if wanted - set(found) or len(lengths) > 1 or None in lengths:
        raise CorruptDataError(f"artifact {record.name!r} lacks tensors or columns", "restore the store from a copy")


def texts_of(data: memoryview, ends: Sequence[int]) -> list[str]:
    """Return the texts of a column; raises :class:`CorruptDataError`."""
    content, begin, found = bytes(data), 0, []
    try:
        for end in ends:
            if not begin <= end <= len(content):
                raise ValueError("its texts do not follow each other")
            found.append(content[begin:end].decode())
            begin = end
    except ValueError as error:
        raise CorruptDataError(f"a column of texts cannot be read: {error}") from error
    return found


def problems_of(reader: Reader) -> Iterator[tuple[bytes, str]]:
    """Yield (key, what) of what does not hold among the artifacts of a store. Reads all of them."""
    names = set()
    for key in reader.keys(ARTIFACTS):
        if not key.startswith((RECORD, BLOB)):
            yield key, "no key of an artifact"
    for key, data in reader.scan(ARTIFACTS, prefix=RECORD):
        try:
            record = ArtifactRecord.unpack(key, data)
            names.add(key[1:])
            read_blob(record, reader.get(ARTIFACTS, BLOB + key[1:]))
        except CorruptDataError as error:
            yield key, error.message
    for key in reader.keys(ARTIFACTS, prefix=BLOB):
        if key[1:] not in names:
            yield key, "numbers of an artifact without its record"


def damaged(reader: Reader) -> list[bytes]:
    """Return the keys that a repair takes out: of each artifact that does not hold, all."""
    keys = set()
    for key, _ in problems_of(reader):
        keys.add(key)
        if key.startswith((RECORD, BLOB)):
            keys |= {RECORD + key[1:], BLOB + key[1:]}
    return sorted(keys)


def sizes(reader: Reader) -> tuple[int, int]:
    """Return how many artifacts there are, and the bytes of their keys and values."""
    count = total = 0
    for key in reader.keys(ARTIFACTS):
        count += key.startswith(RECORD)
        total += len(key) + (reader.size(ARTIFACTS, key) or 0)
    return count, total
