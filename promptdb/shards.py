"""Recorded activations as files that other programs read: safetensors shards, and a manifest."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from blake3 import blake3

from promptdb.activations import Entry, Series, entry_of
from promptdb.blobs import TensorSpec, plan_blob
from promptdb.errors import NotRecordedError, StoreError
from promptdb.keys import Root, pack_tokens, unpack_tokens
from promptdb.version import __version__

if TYPE_CHECKING:
    from promptdb.db import PromptDB
    from promptdb.format import NodeRecord
    from promptdb.snapshot import Snapshot

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ExportReport:
    """What was written: rows, files without the manifest, and bytes."""

    num_rows: int
    num_files: int
    size_bytes: int


def export_activations(
    db: PromptDB,
    directory: str | os.PathLike[str],
    root: Root,
    series: Series,
    nodes: Sequence[bytes],
    *,
    shard_bytes: int = 256 << 20,
) -> ExportReport:
    """Write rows of spans to ``rows-00000.safetensors`` and so on, then ``manifest.json``.

    Parameters
    ----------
    directory : created; must not hold a manifest.
    root, series : identity and series of the rows.
    nodes : spans, in the order in which they are written.
    shard_bytes : a file holds whole spans, and at least one.

    Returns
    -------
    ExportReport

    Raises
    ------
    NotRecordedError
        A span's rows are not stored any more.
    StoreError
        The directory holds an export, or cannot be written.
    CorruptDataError
        An entry does not hold.

    Notes
    -----
    A file has ``rows`` ``[m, ...]``, ``token_ids`` and ``positions`` (U32 ``[m]``): each row's token and place in its
    prompt. The manifest comes last: a directory without one is not complete. One copy, from the memory map into the
    file; no torch.
    """
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        if (target / MANIFEST).exists():
            raise StoreError(f"{target} holds an export already", "choose another directory")
        files = []
        for number, shard in enumerate(_cut(db, series, nodes, shard_bytes)):
            files.append(_write_shard(db, target / f"rows-{number:05}.safetensors", root, series, shard))
        manifest = {
            "promptdb": __version__,
            "point": series.point,
            "layer": series.layer,
            "dtype": series.dtype,
            "row_shape": files[0]["row_shape"] if files else [],
            "num_rows": sum(each["num_rows"] for each in files),
            **asdict(root),
            "files": [{name: each[name] for name in ("name", "num_rows", "size_bytes", "blake3")} for each in files],
        }
        part = target / (MANIFEST + ".part")
        part.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        part.replace(target / MANIFEST)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{target} cannot be written: {error.strerror}", "check the disk and its permissions"
        ) from error
    return ExportReport(manifest["num_rows"], len(files), sum(each["size_bytes"] for each in files))


def _cut(db: PromptDB, series: Series, nodes: Sequence[bytes], shard_bytes: int) -> Iterator[list[bytes]]:
    shard: list[bytes] = []
    size_bytes = 0
    for node in nodes:
        with db.read() as snapshot:
            entry, _ = _entry(snapshot, node, series)
            added = entry.num_rows * (entry.row_bytes + 8)
        if shard and size_bytes + added > shard_bytes:
            yield shard
            shard, size_bytes = [], 0
        shard.append(node)
        size_bytes += added
    if shard:
        yield shard


def _entry(snapshot: Snapshot, node: bytes, series: Series) -> tuple[Entry, NodeRecord]:
    record = snapshot.record(node)
    entry = None if record is None else entry_of(snapshot, node, series, record.num_tokens)
    if entry is None or record is None:
        raise NotRecordedError(f"{series} of span {node[:8].hex()} is not stored any more", "export again")
    return entry, record


def _write_shard(db: PromptDB, path: Path, root: Root, series: Series, nodes: Sequence[bytes]) -> dict[str, Any]:
    part = path.with_suffix(".part")
    with db.read() as snapshot, part.open("wb") as stream:
        found = [_entry(snapshot, node, series) for node in nodes]
        count = sum(entry.num_rows for entry, _ in found)
        row_shape = found[0][0].rows.shape[1:]
        specs = [
            TensorSpec("rows", series.dtype, (count, *row_shape)),
            TensorSpec("token_ids", "U32", (count,)),
            TensorSpec("positions", "U32", (count,)),
        ]
        plan = plan_blob(specs, {"point": series.point, "weights_id": root.weights_id})
        out = _Hashed(stream)
        out.write(plan.header)
        token_ids, positions = array("I"), array("I")
        for entry, record in found:
            if entry.rows.shape[1:] != row_shape:
                raise StoreError(f"rows of {series} have several shapes", "record them again")
            out.write(entry.rows.data)
            own = unpack_tokens(record.span)
            token_ids.extend(own[offset] for offset in entry.tokens())
            positions.extend(record.start + offset for offset in entry.tokens())
        out.write(pack_tokens(token_ids))
        out.write(pack_tokens(positions))
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
    return {
        "name": path.name, "num_rows": count, "row_shape": list(row_shape), "size_bytes": out.size_bytes,
        "blake3": out.hasher.hexdigest(),
    }  # fmt: skip


class _Hashed:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.hasher, self.size_bytes = stream, blake3(), 0

    def write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self.hasher.update(data)
        self.size_bytes += len(data)
