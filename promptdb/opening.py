"""Where a store is, and what it must be before it is used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from promptdb.errors import (
    CorruptDataError,
    FormatVersionError,
    InputTypeError,
    NotAStoreError,
    StoreError,
    StoreKeyError,
)
from promptdb.format import FORMAT_VERSION, META, NODES, SEAL_KEY, STORE_KEY, pack_record, unpack_record
from promptdb.life import DEFAULT_COMPRESSION, Limits, Usage, read_limits
from promptdb.rebuild import FIRST_VERSION_WITH_CODING, FIRST_VERSION_WITH_LIFE
from promptdb.snapshot import VERIFY_MODES
from promptdb.tables import Index, Writer
from promptdb.version import __version__

DEFAULT_CHUNK_TOKENS = 256
MAX_CHUNK_TOKENS = 1 << 20
PATH_VARIABLE = "PROMPTDB_PATH"


class Wanted(NamedTuple):
    """Settings that whoever opens a store asks for. They hold for a new one, and must be those of an old one.

    None: those that it has, or the defaults.
    """

    chunk_tokens: int | None = None
    quota_bytes: int | None = None
    policy: str | None = None
    compression: str | None = None


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


def open_settings(
    index: Index, path: Path | None, wanted: Wanted, clock: Callable[[], float], user_key: bytes | None
) -> tuple[Index, dict[str, Any]]:
    """Return the tables of a store as its users see them, decrypted, and its settings; a new one gets them now.

    Raises
    ------
    NotAStoreError, FormatVersionError, CorruptDataError
        What is there cannot be used.
    StoreKeyError
        It is encrypted and this is not its key, or it is not and there is one.
    StoreError
        It has other settings than those that were asked for.
    """
    with index.read() as reader:
        data = reader.get(META, STORE_KEY)
        found = None if data is None else unpack_record(STORE_KEY, data)
        is_empty = reader.count(NODES) == 0
        is_sealed = reader.size(META, SEAL_KEY) is not None
    del reader  # or it would keep a slot of LMDB's while the next one is opened
    if found is None:
        if index.readonly and is_empty:
            raise NotAStoreError(
                f"there is no store at {path}, or it is being created at this moment",
                "try again; `promptdb put` creates one; check --db and PROMPTDB_PATH",
            )
        if not is_empty:
            raise NotAStoreError(f"{path} is an LMDB file of something else", "choose another path")
        found, is_sealed = _create(index, wanted, clock(), user_key)
    _check_version(found, path, readonly=index.readonly)
    opened = index
    if is_sealed or user_key is not None:
        opened = _unlock(index, path, user_key, is_sealed=is_sealed)
    _check_settings(opened, found, path, wanted)
    return opened, found


def _create(index: Index, wanted: Wanted, now: float, user_key: bytes | None) -> tuple[dict[str, Any], bool]:
    """Store the settings of a new store, and return them and whether it is encrypted."""
    limits = Limits(
        wanted.quota_bytes or Limits.quota_bytes,
        wanted.policy or Limits.policy,
        wanted.compression or Limits.compression,
    )
    # Older programs may use a store that has nothing that is new to them.
    is_coded = user_key is not None or limits.compression != DEFAULT_COMPRESSION
    fields = {
        "format_version": FIRST_VERSION_WITH_CODING if is_coded else FIRST_VERSION_WITH_LIFE,
        "chunk_tokens": wanted.chunk_tokens or DEFAULT_CHUNK_TOKENS,
        "created_unix_s": now,
        "created_by": f"promptdb {__version__}",
    }

    def create(writer: Writer) -> tuple[dict[str, Any], bool]:
        # Another process may have been first; then its settings hold.
        standing = writer.get(META, STORE_KEY)
        if standing is not None:
            return unpack_record(STORE_KEY, standing), writer.size(META, SEAL_KEY) is not None
        writer.put(META, STORE_KEY, pack_record(STORE_KEY, fields))
        if user_key is not None:
            from promptdb.sealed import create_seal

            writer = create_seal(writer, user_key, now)
        Usage().write(writer)
        limits.write(writer)
        return fields, user_key is not None

    return index.transact(create)


def _unlock(index: Index, path: Path | None, user_key: bytes | None, *, is_sealed: bool) -> Index:
    if not is_sealed:
        raise StoreKeyError(
            f"{path} is not encrypted, but a key was given",
            "leave the key out (PROMPTDB_KEY, PROMPTDB_KEY_FILE), or move what is stored into a new store that is "
            "encrypted: `promptdb export`, `promptdb import`",
        )
    if user_key is None:
        raise StoreKeyError(f"{path} is encrypted, and there is no key", "set PROMPTDB_KEY_FILE or PROMPTDB_KEY")
    # Imported here: only encrypted stores need cryptography.
    from promptdb.sealed import unlock

    return unlock(index, path, user_key)


def rotate(index: Index, path: Path | None, new_key: bytes | None, now: float) -> bytes:
    """Let another user's key open an encrypted store, and return it; see :meth:`promptdb.PromptDB.rotate_key`."""
    if new_key is None:
        raise StoreKeyError("there is no new key", "`openssl rand -hex 32` makes one")
    from promptdb.sealed import SealedIndex

    if not isinstance(index, SealedIndex):
        raise StoreKeyError(f"{path} is not encrypted", "a store is encrypted from its creation on, or never")
    index.rewrap(new_key, now)
    return new_key


def _check_version(found: dict[str, Any], path: Path | None, *, readonly: bool) -> None:
    version = found.get("format_version")
    if type(version) is not int or version < 1:
        raise CorruptDataError(f"{path} has format version {version!r}", "restore the store from a copy")
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path} has format version {version}; this promptdb {__version__} reads up to {FORMAT_VERSION}",
            "upgrade promptdb",
        )
    if version < FIRST_VERSION_WITH_LIFE and not readonly:
        raise FormatVersionError(
            f"{path} has format version {version}, which this promptdb {__version__} reads, and does not write",
            "`promptdb migrate` brings it up to date; to read it as it is, open it with readonly=True",
        )


def _check_settings(index: Index, found: dict[str, Any], path: Path | None, wanted: Wanted) -> None:
    chunk = found.get("chunk_tokens")
    if type(chunk) is not int or not 1 <= chunk <= MAX_CHUNK_TOKENS or type(found.get("created_unix_s")) is not float:
        raise CorruptDataError(f"{path} has settings that cannot be", "restore the store from a copy")
    if wanted.chunk_tokens is not None and wanted.chunk_tokens != chunk:
        raise StoreError(
            f"{path} was created with chunk_tokens={chunk}, not {wanted.chunk_tokens}",
            "leave chunk_tokens out, or create another store",
        )
    with index.read() as reader:
        limits = read_limits(reader)
    setters = {"quota_bytes": "set_quota()", "policy": "set_quota()", "compression": "set_compression()"}
    for name, setter in setters.items():
        asked, held = getattr(wanted, name), getattr(limits, name)
        if asked is not None and asked != held:
            raise StoreError(f"{path} has {name}={held!r}, not {asked!r}", f"leave {name} out, or {setter} changes it")
