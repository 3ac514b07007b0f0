"""Artifacts: named results of experiments, kept in the store. See docs/artifacts.md."""

from __future__ import annotations

import json
import os
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from promptdb.artifact_records import (
    LONGEST_NAME_BYTES,
    MAX_TEXT_BYTES,
    NUMBER,
    RECORD,
    TEXT,
    ArtifactRecord,
    blob_key,
    build,
    column_name,
    ends_name,
    read_blob,
    record_key,
    tensor_name,
    texts_of,
)
from promptdb.blobs import TensorSpec, TensorView, parse_blob
from promptdb.errors import CorruptDataError, InputTypeError, NodeNotFoundError, StoreError
from promptdb.format import ARTIFACTS, checksum
from promptdb.life import DEFAULT_COMPRESSION, read_limits
from promptdb.packing import pack
from promptdb.plots import Plot
from promptdb.tables import Index, Reader, Writer
from promptdb.version import __version__

if TYPE_CHECKING:
    import torch

__all__ = ["Artifact", "Artifacts"]

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "BOOL": "bool",
}  # fmt: skip
_OF_TORCH = {f"torch.{name}": dtype for dtype, name in _TORCH_NAMES.items()}
_OF_NUMPY = {name: dtype for dtype, name in _TORCH_NAMES.items() if not name.startswith(("bfloat", "float8"))}

Part = tuple[TensorSpec, bytes | memoryview]


@dataclass(frozen=True)
class Artifact:
    """A named result, as a store keeps it.

    Attributes
    ----------
    record : its name, when it was saved, its config, notes, plot, and the names of its tensors and columns.
    blob : its numbers; see FORMAT.md. Memory of its own.

    Notes
    -----
    Thread safe; what ``config`` and ``columns`` give must not be changed.
    """

    record: ArtifactRecord
    blob: bytes | bytearray = field(repr=False)

    @property
    def name(self) -> str:
        """Under which it is kept."""
        return self.record.name

    @property
    def config(self) -> Any:
        """What it was made with, as it was given, but for tuples, which are lists now."""
        return self.record.config

    @property
    def notes(self) -> str:
        """Text."""
        return self.record.notes

    @property
    def plot(self) -> Plot | None:
        """What its picture shows, if there is one."""
        return self.record.plot

    @cached_property
    def _views(self) -> dict[str, TensorView]:
        return parse_blob(self.blob) if self.blob else {}

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name, on the CPU, each a copy. Imports torch."""
        import torch

        found = {}
        for name in self.record.tensors:
            view = self._views[tensor_name(name)]
            dtype = getattr(torch, _TORCH_NAMES[view.dtype])
            content = bytearray(view.data)
            flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            found[name] = flat.view(view.shape)
        return found

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """Its table: by name, lists of one length of numbers, truth values or texts."""
        found: dict[str, list[Any]] = {}
        for number, (name, kind) in enumerate(self.record.columns):
            view = self._views[column_name(number)]
            if kind == TEXT:
                found[name] = texts_of(view.data, _integers(self._views[ends_name(number)]))
            elif view.dtype == "F64":
                found[name] = view.floats().tolist()
            elif view.dtype == "BOOL":
                found[name] = [each != 0 for each in bytes(view.data)]
            else:
                found[name] = _integers(view)
        return found

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the dtype (safetensors' name) and shape of each tensor by name."""
        views = {name: self._views[tensor_name(name)] for name in self.record.tensors}
        return {name: (view.dtype, view.shape) for name, view in views.items()}

    def tensor_file(self) -> bytearray:
        """Return its tensors as a safetensors file, under their own names."""
        named = [(name, self._views[tensor_name(name)]) for name in self.record.tensors]
        return build([(TensorSpec(name, view.dtype, view.shape), view.data) for name, view in named])

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw its picture into a file, ``.png``, ``.svg`` or ``.pdf``; see :func:`promptdb.pictures.draw`.

        Raises
        ------
        InputTypeError
            It has no plot, or one that its data does not fit.
        """
        from promptdb.pictures import draw

        if self.plot is None:
            raise InputTypeError(f"artifact {self.name!r} has no plot", "save it with plot={'kind': ..., 'y': ...}")
        data: dict[str, Any] = dict(self.columns)
        for name in set(self.plot.names) & set(self.record.tensors):
            data[name] = self.tensors[name].double().numpy()
        draw(self.plot, data, path)


class Artifacts:
    """The artifacts of a store: ``db.artifacts``. Thread safe.

    Parameters
    ----------
    index : the store's tables.
    clock : seconds since 1970.
    """

    def __init__(self, index: Index, clock: Callable[[], float]) -> None:
        self._index, self._clock = index, clock

    def save(
        self,
        name: str,
        *,
        tensors: Mapping[str, Any] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        config: Any = None,
        plot: Plot | Mapping[str, Any] | None = None,
        notes: str = "",
        replace: bool = False,
    ) -> Artifact:
        """Keep a result under a name, durably.

        Parameters
        ----------
        name : 1 to 400 bytes of UTF-8; slashes group names, by habit only.
        tensors : by name, torch tensors on any device, or numpy arrays.
        columns : a table: by name, sequences of one length, each of numbers, of truth values, or of texts.
        config : what JSON has: numbers, texts, truth values, None, lists and dicts of them.
        plot : what a picture of it shows: names of tensors and columns; a :class:`~promptdb.plots.Plot` or its fields.
        notes : text.
        replace : take the place of an artifact of that name.

        Returns
        -------
        Artifact
            As :meth:`load` will give it.

        Raises
        ------
        InputTypeError
            Something that cannot be kept, or a plot of what is not there.
        StoreError
            There is one of that name, and ``replace`` is not set.
        ReadOnlyStoreError, StoreFullError
            Nothing of it is visible.

        Notes
        -----
        One transaction. Two copies of it are in memory. Never evicted, and not counted by quotas: see
        docs/artifacts.md.
        """
        made = self.make(name, tensors=tensors, columns=columns, config=config, plot=plot, notes=notes)
        return self.keep(made, replace=replace)

    def make(
        self,
        name: str,
        *,
        tensors: Mapping[str, Any] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        config: Any = None,
        plot: Plot | Mapping[str, Any] | None = None,
        notes: str = "",
        key: str = "",
    ) -> Artifact:
        """Return an artifact that is not kept yet; otherwise as :meth:`save`. ``key``: what it was made from, hex."""
        check_name(name)
        named = {each: _part(tensor_name(each), value) for each, value in _mapping("tensors", tensors).items()}
        table = {each: list(values) for each, values in _mapping("columns", columns).items()}
        both = sorted(set(named) & set(table))
        if both:
            raise InputTypeError(f"{both[0]!r} is a tensor and a column", "give one of them another name")
        if len({len(values) for values in table.values()}) > 1:
            lengths = ", ".join(f"{each}: {len(values)}" for each, values in table.items())
            raise InputTypeError(f"columns of several lengths: {lengths}", "keep them as tensors")
        parts = list(named.values())
        kinds: list[tuple[str, str]] = []
        for number, (each, values) in enumerate(table.items()):
            kind, added = _column(number, each, values)
            kinds.append((each, kind))
            parts += added
        wanted = None if plot is None else Plot.of(plot)
        missing = [each for each in (wanted.names if wanted is not None else ()) if each not in {**named, **table}]
        if missing:
            raise InputTypeError(f"the plot shows {missing[0]!r}, which is neither a tensor nor a column")
        record = ArtifactRecord(
            name, self._clock(), f"promptdb {__version__}", _as_json(config), wanted, notes, key, tuple(kinds),
            tuple(named),
        )  # fmt: skip
        if not isinstance(notes, str) or len(record.pack()) > MAX_TEXT_BYTES:
            raise InputTypeError("notes that are no text, or a config of more than 16 MiB", "keep it in a tensor")
        return Artifact(record, build(parts) if parts else b"")

    def keep(self, made: Artifact, *, replace: bool = False) -> Artifact:
        """Store what :meth:`make` has made; otherwise as :meth:`save`."""
        name = made.name
        with self._index.read() as reader:
            is_packed = read_limits(reader).compression != DEFAULT_COMPRESSION
        stored = pack(made.blob) if is_packed and made.blob else made.blob
        digest = checksum(blob_key(name), stored) if stored else b""
        record = _with_blob(made.record, len(stored), digest)

        def work(writer: Writer) -> None:
            if not replace and writer.size(ARTIFACTS, record_key(name)) is not None:
                raise StoreError(f"there is an artifact {name!r} already", "replace=True takes its place")
            writer.put(ARTIFACTS, record_key(name), record.pack())
            if stored:
                writer.put(ARTIFACTS, blob_key(name), stored)
            else:
                writer.delete(ARTIFACTS, blob_key(name))

        self._index.transact(work)
        return Artifact(record, made.blob)

    def load(self, name: str) -> Artifact:
        """Return the artifact of a name.

        Raises
        ------
        NodeNotFoundError
            There is none.
        CorruptDataError
            It does not hold.

        Notes
        -----
        Reads all of it, once, and checks it.
        """
        with self._index.read() as reader:
            record = _record(reader, name)
            stored = reader.get(ARTIFACTS, blob_key(name)) if record.blob_bytes else None
            return Artifact(record, bytes(read_blob(record, stored)))

    def find(self, name: str) -> ArtifactRecord | None:
        """Return what is known of an artifact without its numbers, or None; raises :class:`CorruptDataError`."""
        check_name(name)
        with self._index.read() as reader:
            data = reader.get(ARTIFACTS, record_key(name))
            return None if data is None else ArtifactRecord.unpack(record_key(name), data)

    def list(self) -> Sequence[ArtifactRecord]:
        """Return what is known of all artifacts without their numbers, by name; raises :class:`CorruptDataError`."""
        with self._index.read() as reader:
            return [ArtifactRecord.unpack(key, data) for key, data in reader.scan(ARTIFACTS, prefix=RECORD)]

    def remove(self, name: str) -> None:
        """Remove an artifact, whether it holds or not; raises :class:`NodeNotFoundError` if there is none."""
        check_name(name)

        def work(writer: Writer) -> bool:
            writer.delete(ARTIFACTS, blob_key(name))
            return writer.delete(ARTIFACTS, record_key(name))

        if not self._index.transact(work, frees=True):
            raise _none(name)


def check_name(name: object) -> None:
    """Raise :class:`InputTypeError` unless this can be the name of an artifact."""
    try:
        sound = isinstance(name, str) and 0 < len(name.encode()) <= LONGEST_NAME_BYTES
    except UnicodeEncodeError:
        sound = False
    if not sound:
        raise InputTypeError(f"the name of an artifact is {name!r}", f"choose 1 to {LONGEST_NAME_BYTES} bytes of text")


def _none(name: str) -> NodeNotFoundError:
    return NodeNotFoundError(f"there is no artifact {name!r}", "`promptdb artifacts ls` lists them")


def _record(reader: Reader, name: str) -> ArtifactRecord:
    check_name(name)
    data = reader.get(ARTIFACTS, record_key(name))
    if data is None:
        raise _none(name)
    return ArtifactRecord.unpack(record_key(name), data)


def _with_blob(record: ArtifactRecord, size_bytes: int, digest: bytes) -> ArtifactRecord:
    return replace(record, blob_bytes=size_bytes, blob_checksum=digest)


def _mapping(what: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name for name in value):
        raise InputTypeError(f"{what} must be a dict whose keys are names", f"{what}={{'name': ...}}")
    if "__metadata__" in value:  # safetensors keeps it for itself
        raise InputTypeError(f"{what} cannot have the name '__metadata__'")
    return dict(value)


def _as_json(config: Any) -> Any:
    """Return a config as JSON will give it back; raises :class:`InputTypeError` for what JSON has not."""
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputTypeError(f"the config cannot be kept: {error}", "numbers, texts, lists and dicts can") from error


def _part(name: str, value: Any) -> Part:
    """Return a torch tensor or numpy array as bytes."""
    if hasattr(value, "detach"):  # torch's, which is not imported for those who have none
        dtype = _OF_TORCH.get(str(value.dtype))
        if dtype is not None and str(value.layout) == "torch.strided" and not value.is_meta:
            import torch

            found = value.detach().cpu().contiguous()
            data = memoryview(found.reshape(-1).view(torch.uint8).numpy()) if found.numel() else b""
            return TensorSpec(name, dtype, tuple(found.shape)), data
    elif hasattr(value, "__array_interface__"):
        import numpy

        array = numpy.asarray(value)
        dtype = _OF_NUMPY.get(array.dtype.name)
        if dtype is not None:
            return TensorSpec(name, dtype, array.shape), array.astype(array.dtype.newbyteorder("<")).tobytes()
    kind = getattr(value, "dtype", type(value).__name__)
    raise InputTypeError(
        f"tensor {name[2:]!r} of {kind} cannot be kept", "tensors of torch and arrays of numpy can; lists are columns"
    )


def _column(number: int, name: str, values: Sequence[Any]) -> tuple[str, list[Part]]:
    """Return the kind of a column, and its parts of the blob."""
    values = [
        value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value for value in values
    ]
    rows, kinds = (len(values),), {type(value) for value in values}
    at = column_name(number)
    try:
        if kinds <= {str}:
            texts = [value.encode() for value in values]
            ends, total = array("q"), 0
            for text in texts:
                total += len(text)
                ends.append(total)
            content = b"".join(texts)
            return TEXT, [
                (TensorSpec(at, "U8", (total,)), content),
                (TensorSpec(ends_name(number), "I64", rows), _little(ends)),
            ]
        if kinds == {bool}:
            return NUMBER, [(TensorSpec(at, "BOOL", rows), bytes(values))]
        if kinds == {int}:
            return NUMBER, [(TensorSpec(at, "I64", rows), _little(array("q", values)))]
        if kinds <= {int, float}:
            return NUMBER, [(TensorSpec(at, "F64", rows), _little(array("d", values)))]
    except (OverflowError, UnicodeEncodeError) as error:
        raise InputTypeError(f"column {name!r} cannot be kept: {error}") from error
    found = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise InputTypeError(f"column {name!r} holds {found}", "columns are of numbers, of truth values, or of texts")


def _little(values: array[Any]) -> bytes:
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def _integers(view: TensorView) -> list[int]:
    if view.dtype != "I64":
        raise CorruptDataError(f"a column of an artifact is {view.dtype}")
    values = array("q")
    values.frombytes(view.data)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
