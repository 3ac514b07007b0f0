"""Recorded activations as files that other programs read: safetensors, Parquet or Zarr, and a manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from promptdb import shards_parquet, shards_safetensors, shards_zarr
from promptdb.activations import Series
from promptdb.errors import InputTypeError, StoreError
from promptdb.keys import Root
from promptdb.shard_rows import WIDENED, Source, Written
from promptdb.version import __version__

if TYPE_CHECKING:
    from promptdb.db import PromptDB

MANIFEST = "manifest.json"


class _Format(NamedTuple):
    write: Callable[[Source, Path, int], Written]
    shard_bytes: int


_FORMATS = {
    "safetensors": _Format(shards_safetensors.write_safetensors, shards_safetensors.DEFAULT_SHARD_BYTES),
    "parquet": _Format(shards_parquet.write_parquet, shards_parquet.DEFAULT_SHARD_BYTES),
    "zarr": _Format(shards_zarr.write_zarr, shards_zarr.DEFAULT_SHARD_BYTES),
}
FORMATS = tuple(_FORMATS)


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
    file_format: str = "safetensors",
    shard_bytes: int | None = None,
) -> ExportReport:
    """Write rows of spans to files in a directory, then ``manifest.json``.

    Parameters
    ----------
    directory : created; must not hold a manifest.
    root, series, nodes : identity and series of the rows, and spans in the order in which they are written:
        :meth:`PromptDB.recorded_spans` gives all three.
    file_format : ``"safetensors"``, ``"parquet"`` or ``"zarr"``: see :func:`write_safetensors`, :func:`write_parquet`,
        :func:`write_zarr` in the modules of that name. The latter two write bfloat16 as float32, exactly.
    shard_bytes : how many bytes of rows a file may hold, before compression; 256 MiB unless given, 16 MiB of Zarr.

    Returns
    -------
    ExportReport

    Raises
    ------
    NotRecordedError
        A span's rows are not stored any more.
    StoreError
        The directory holds an export, or cannot be written.
    MissingLibraryError
        The library for the format is not installed.
    CorruptDataError
        An entry does not hold.

    Notes
    -----
    The manifest comes last: a directory without one is not complete. Memory: some 16 MiB of rows. No torch.
    """
    target = Path(directory)
    if file_format not in _FORMATS:
        raise InputTypeError(f"file_format is {file_format!r}", f"choose one of {', '.join(FORMATS)}")
    if file_format != "safetensors" and series.dtype not in WIDENED:
        raise StoreError(f"rows of {series.dtype} cannot be written as {file_format}", "choose safetensors")
    chosen = _FORMATS[file_format]
    source = Source(db, root, series, nodes)
    try:
        target.mkdir(parents=True, exist_ok=True)
        if (target / MANIFEST).exists():
            raise StoreError(f"{target} holds an export already", "choose another directory")
        rows, files = chosen.write(source, target, shard_bytes or chosen.shard_bytes)
        manifest = {
            "promptdb": __version__,
            "format": file_format,
            **source.describe(),
            "num_rows": rows,
            "files": [{name: value for name, value in each._asdict().items() if value is not None} for each in files],
        }
        part = target / (MANIFEST + ".part")
        part.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        part.replace(target / MANIFEST)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{target} cannot be written: {error.strerror or error}", "check the disk and its permissions"
        ) from error
    return ExportReport(rows, len(files), sum(each.size_bytes for each in files))
