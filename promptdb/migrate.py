"""Bringing a store of an older format version up to date: in a copy, which takes the old file's place when it holds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from promptdb.errors import CorruptDataError, FormatVersionError, NotAStoreError
from promptdb.format import FORMAT_VERSION, META, STORE_KEY, unpack_record
from promptdb.opening import open_index
from promptdb.rebuild import FIRST_VERSION_WITH_LIFE
from promptdb.tables import Reader, Writer
from promptdb.verify import repair, verify


@dataclass(frozen=True)
class MigrationReport:
    """What became of a store.

    Attributes
    ----------
    from_version, to_version : of the format; equal if there was nothing to do.
    num_removed : damaged spans that were left out.
    kept : the old file, or None if it was not kept.
    """

    from_version: int
    to_version: int
    num_removed: int = 0
    kept: Path | None = None


def migrate(path: str | os.PathLike[str], *, keep: bool = False) -> MigrationReport:
    """Bring a store up to date.

    Parameters
    ----------
    path : directory of the store. Nobody else may have it open.
    keep : keep the old file beside the new one, as ``data.mdb.v1`` for format version 1. It is kept in any case if
        something in it was damaged.

    Returns
    -------
    MigrationReport

    Raises
    ------
    FormatVersionError
        The store is of a newer version.
    StoreError, StoreFullError
        Somebody else has it open, or there is no room for a copy.
    CorruptDataError
        The settings are damaged, or the copy does not hold; the store is as it was.

    Notes
    -----
    Some seconds a gigabyte, and as much free disk as the store uses. Killed at any moment, it leaves the store as it
    was, or as it should be: run it again. The old file is deleted only when every record, blob and index entry of the
    new one has been checked, and the new one is on the disk.
    """
    directory = Path(path)
    index = open_index(directory, readonly=True, map_bytes=None, durability="power")
    try:
        with index.read() as reader:
            version = _version(reader, directory)
    finally:
        index.close()
    if version >= FIRST_VERSION_WITH_LIFE:
        return MigrationReport(version, version)  # newer ones differ in what they use: nothing of it is missing
    return _migrate(directory, version, keep=keep)


def _version(reader: Reader, directory: Path) -> int:
    data = reader.get(META, STORE_KEY)
    if data is None:
        raise NotAStoreError(f"{directory} is an LMDB file of something else", "choose another path")
    version = unpack_record(STORE_KEY, data).get("format_version")
    if type(version) is not int or version < 1:
        raise CorruptDataError(f"{directory} has format version {version!r}", "restore the store from a copy")
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{directory} has format version {version}; this promptdb writes {FORMAT_VERSION}", "upgrade promptdb"
        )
    return version


def _migrate(directory: Path, version: int, *, keep: bool) -> MigrationReport:
    from promptdb.index import LmdbIndex
    from promptdb.lmdb_errors import DATA_FILE

    kept = directory / f"{DATA_FILE}.v{version}"
    removed = 0

    def change(writer: Writer) -> None:
        nonlocal removed
        removed = repair(writer, read_blobs=True)

    def check(reader: Reader) -> None:
        problems = verify(reader)
        if problems:
            first = f"{len(problems)} problems, the first: {problems[0].what}"
            raise CorruptDataError(f"the new file of {directory} does not hold: {first}", "the store is as it was")

    index = LmdbIndex(directory)
    try:
        kept.unlink(missing_ok=True)  # of a migration that was killed before the new file took its place
        index.migrate(change, check, kept)
    except BaseException:
        kept.unlink(missing_ok=True)
        raise
    finally:
        index.close()
    if keep or removed:
        return MigrationReport(version, FIRST_VERSION_WITH_LIFE, removed, kept)
    kept.unlink()
    return MigrationReport(version, FIRST_VERSION_WITH_LIFE)
