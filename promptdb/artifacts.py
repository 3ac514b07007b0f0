"""Artifacts: named results of experiments, kept in the store. See docs/artifacts.md."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from promptdb.artifact_records import (
    LONGEST_NAME_BYTES,
    MAX_TEXT_BYTES,
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
from promptdb.artifact_values import TORCH_NAMES, as_json, column_parts, integers, named, tensor_part
from promptdb.blobs import TensorSpec, TensorView, parse_blob
from promptdb.errors import CorruptDataError, InputTypeError, NodeNotFoundError, StoreError
from promptdb.events import warn
from promptdb.format import ARTIFACTS, checksum
from promptdb.life import DEFAULT_COMPRESSION, read_limits
from promptdb.packing import pack
from promptdb.plots import Plot
from promptdb.tables import Index, Reader, Writer
from promptdb.version import __version__

if TYPE_CHECKING:
    import torch

__all__ = ["Artifact", "Artifacts"]


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
            dtype = getattr(torch, TORCH_NAMES[view.dtype])
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
                found[name] = texts_of(view.data, integers(self._views[ends_name(number)]))
            elif view.dtype == "F64":
                found[name] = view.floats().tolist()
            elif view.dtype == "BOOL":
                found[name] = [each != 0 for each in bytes(view.data)]
            else:
                found[name] = integers(view)
        return found

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the dtype (safetensors' name) and shape of each tensor by name."""
        views = {name: self._views[tensor_name(name)] for name in self.record.tensors}
        return {name: (view.dtype, view.shape) for name, view in views.items()}

    def tensor_file(self) -> bytearray:
        """Return its tensors as a safetensors file, under their own names."""
        views = [(name, self._views[tensor_name(name)]) for name in self.record.tensors]
        return build([(TensorSpec(name, view.dtype, view.shape), view.data) for name, view in views])

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
        arrays = {each: tensor_part(tensor_name(each), value) for each, value in named("tensors", tensors).items()}
        table = {each: list(values) for each, values in named("columns", columns).items()}
        both = sorted(set(arrays) & set(table))
        if both:
            raise InputTypeError(f"{both[0]!r} is a tensor and a column", "give one of them another name")
        if len({len(values) for values in table.values()}) > 1:
            lengths = ", ".join(f"{each}: {len(values)}" for each, values in table.items())
            raise InputTypeError(f"columns of several lengths: {lengths}", "keep them as tensors")
        parts = list(arrays.values())
        kinds: list[tuple[str, str]] = []
        for number, (each, values) in enumerate(table.items()):
            kind, added = column_parts(number, each, values)
            kinds.append((each, kind))
            parts += added
        wanted = None if plot is None else Plot.of(plot)
        missing = [each for each in (wanted.names if wanted is not None else ()) if each not in {**arrays, **table}]
        if missing:
            raise InputTypeError(f"the plot shows {missing[0]!r}, which is neither a tensor nor a column")
        record = ArtifactRecord(
            name, self._clock(), f"promptdb {__version__}", as_json(config), wanted, notes, key, tuple(kinds),
            tuple(arrays),
        )  # fmt: skip
        _check_size(record)
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
        """Return what is known of all artifacts without their numbers, by name; damaged ones are left out."""
        found = []
        with self._index.read() as reader:
            for key, data in reader.scan(ARTIFACTS, prefix=RECORD):
                try:
                    found.append(ArtifactRecord.unpack(key, data))
                except CorruptDataError as error:
                    warn("damage", f"{error.message}; `promptdb verify --fix` removes it", key=key.hex())
        return found

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


def _check_size(record: ArtifactRecord) -> None:
    """Raise :class:`InputTypeError` for a record that could not be read again."""
    if not isinstance(record.notes, str):
        raise InputTypeError(f"notes are a {type(record.notes).__name__}", "they are text")
    try:
        packed = record.pack()
        if len(packed) > MAX_TEXT_BYTES:
            raise InputTypeError("notes and config have more than 16 MiB", "keep what is large in a tensor")
        ArtifactRecord.unpack(record_key(record.name), packed)
    except (CorruptDataError, UnicodeEncodeError) as error:
        raise InputTypeError(
            f"this cannot be kept: {error}", "fewer columns and tensors, and texts of Unicode"
        ) from error


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
