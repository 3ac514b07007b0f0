"""Where a store is, and what it must be before it is used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from promptdb.errors import CorruptDataError, FormatVersionError, InputTypeError, NotAStoreError, StoreError
from promptdb.format import FORMAT_VERSION, META, NODES, STORE_KEY, pack_record, unpack_record
from promptdb.life import Limits, Usage, read_limits
from promptdb.snapshot import VERIFY_MODES
from promptdb.tables import Index, Writer
from promptdb.version import __version__

DEFAULT_CHUNK_TOKENS = 256
MAX_CHUNK_TOKENS = 1 << 20
PATH_VARIABLE = "PROMPTDB_PATH"


def default_path() -> Path:
    """Return where the store is when nobody says otherwise: ``$PROMPTDB_PATH``, or the user's data directory."""
    if os.environ.get(PATH_VARIABLE):
        return Path(os.environ[PATH_VARIABLE])
    import platformdirs

    return Path(platformdirs.user_data_dir("promptdb")) / "default.promptdb"


def check_options(chunk_tokens: int | None, verify_reads: str, map_bytes: int | None) -> None:
    """Raise what is wrong with the options of a store."""
    for name, value in (("chunk_tokens", chunk_tokens), ("map_bytes", map_bytes)):
        if value is not None and type(value) is not int:
            raise InputTypeError(f"{name} must be an int, not {type(value).__name__}")
    if verify_reads not in VERIFY_MODES:
        raise StoreError(f"verify_reads is {verify_reads!r}", f"choose one of {', '.join(VERIFY_MODES)}")
    if chunk_tokens is not None and not 1 <= chunk_tokens <= MAX_CHUNK_TOKENS:
        raise StoreError(f"chunk_tokens is {chunk_tokens}", f"choose a number from 1 to {MAX_CHUNK_TOKENS}")
    if map_bytes is not None and not 1 <= map_bytes < 1 << 47:
        raise StoreError(f"map_bytes is {map_bytes}", "choose a number of bytes that can be mapped, or leave it out")


def open_index(path: Path, readonly: bool, map_bytes: int | None, durability: str) -> Index:
    """Open the tables at a path, or say why that cannot be."""
    # Imported here: a store in memory does not need lmdb.
    from promptdb.environment import DURABILITIES
    from promptdb.index import DEFAULT_MAP_BYTES, LmdbIndex
    from promptdb.lmdb_errors import DATA_FILE, LOCK_FILE

    if durability not in DURABILITIES:
        raise StoreError(f"durability is {durability!r}", f"choose one of {', '.join(DURABILITIES)}")
    try:
        if path.exists() and not path.is_dir():
            raise NotAStoreError(f"{path} is a file", "a store is a directory; choose another path")
        # A lock file alone: somebody is creating the store at this moment, or was killed while doing so.
        occupied = path.is_dir() and any(entry.name != LOCK_FILE for entry in path.iterdir())
        if occupied and not (path / DATA_FILE).exists():
            raise NotAStoreError(f"{path} is a directory of something else", "choose an empty or new directory")
        if readonly and not occupied:
            raise NotAStoreError(
                f"there is no store at {path}", "`promptdb put` creates one; check --db and PROMPTDB_PATH"
            )
    except NotAStoreError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise StoreError(f"{path} cannot be read: {error}", "check the path and its permissions") from error
    return LmdbIndex(path, readonly=readonly, map_bytes=map_bytes or DEFAULT_MAP_BYTES, durability=durability)


def read_settings(
    index: Index,
    path: Path | None,
    chunk_tokens: int | None,
    clock: Callable[[], float],
    quota_bytes: int | None = None,
    policy: str | None = None,
) -> dict[str, Any]:
    """Return the settings of a store, creating them in a new one; raise if they are not those that were asked for."""
    with index.read() as reader:
        data = reader.get(META, STORE_KEY)
        found = None if data is None else unpack_record(STORE_KEY, data)
        is_empty = reader.count(NODES) == 0
    if found is None:
        if index.readonly or not is_empty:
            raise NotAStoreError(f"{path} is an LMDB file of something else", "choose another path")
        fields = {
            "format_version": FORMAT_VERSION,
            "chunk_tokens": chunk_tokens or DEFAULT_CHUNK_TOKENS,
            "created_unix_s": clock(),
            "created_by": f"promptdb {__version__}",
        }

        def create(writer: Writer) -> dict[str, Any]:
            # Another process may have been first; then its settings hold.
            standing = writer.get(META, STORE_KEY)
            if standing is not None:
                return unpack_record(STORE_KEY, standing)
            writer.put(META, STORE_KEY, pack_record(STORE_KEY, fields))
            Usage().write(writer)
            default = Limits()
            Limits(quota_bytes or default.quota_bytes, policy or default.policy).write(writer)
            return fields

        found = index.transact(create)
    version, chunk = found.get("format_version"), found.get("chunk_tokens")
    if type(version) is not int or version < 1:
        raise CorruptDataError(f"{path} has format version {version!r}", "restore the store from a copy")
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path} has format version {version}; this promptdb {__version__} reads up to {FORMAT_VERSION}",
            "upgrade promptdb",
        )
    if version < FORMAT_VERSION and not index.readonly:
        raise FormatVersionError(
            f"{path} has format version {version}, which this promptdb {__version__} reads, and does not write",
            "`promptdb migrate` brings it up to date; to read it as it is, open it with readonly=True",
        )
    if type(chunk) is not int or not 1 <= chunk <= MAX_CHUNK_TOKENS or type(found.get("created_unix_s")) is not float:
        raise CorruptDataError(f"{path} has settings that cannot be", "restore the store from a copy")
    if chunk_tokens is not None and chunk_tokens != chunk:
        raise StoreError(
            f"{path} was created with chunk_tokens={chunk}, not {chunk_tokens}",
            "leave chunk_tokens out, or create another store",
        )
    del reader  # or it would keep a slot of LMDB's while the next one is opened
    with index.read() as reader:
        limits = read_limits(reader)
    for name, wanted, held in (("quota_bytes", quota_bytes, limits.quota_bytes), ("policy", policy, limits.policy)):
        if wanted is not None and wanted != held:
            raise StoreError(
                f"{path} has {name}={held!r}, not {wanted!r}", f"leave {name} out, or set_quota() changes it"
            )
    return found
