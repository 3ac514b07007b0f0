"""Which files a checkpoint is: a key for memos of its IDs, and what its ``config.json`` says.

A key is about files, not content: it is a memo's key on one machine, never part of an ID.
"""

from __future__ import annotations

import json
import os
import platform
import stat
from pathlib import Path
from typing import Any

from promptdb.errors import ModelNotFoundError
from promptdb.hashing import FieldHasher

__all__ = ["describe", "file_key", "resolve", "tokenizer_files_present"]

_MAX_CONFIG_BYTES = 16 << 20  # of a config.json that is worth reading
# Names that loading a model or tokenizer never opens.
_IGNORED_NAMES = frozenset({"readme.md", "readme", "readme.txt", "license", "license.txt", "license.md", "notice"})
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def resolve(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """Find a checkpoint on this machine; the network is never used.

    Parameters
    ----------
    path_or_hub_id : a directory, or the ID of a repository that is in the local Hugging Face cache.

    Returns
    -------
    Path
        The directory as given, or the cached snapshot.

    Raises
    ------
    ModelNotFoundError
        Neither.
    """
    name = os.fspath(path_or_hub_id)
    path = Path(name).expanduser() if name else Path("/dev/null")  # Path("") is the working directory
    try:
        if path.is_dir():
            return path
        is_file = path.is_file()
    except (OSError, ValueError) as error:  # too long, a NUL in it, no permission
        raise ModelNotFoundError(f"cannot look for {name!r}: {error}", "check the path to the checkpoint") from error
    if is_file:
        raise ModelNotFoundError(f"{name} is a file", "give the directory that holds it and config.json")
    hint = "download it first (hf download), or give a directory"
    looks_like_path = name.startswith((".", "~")) or path.is_absolute() or name.count("/") > 1 or not name
    if looks_like_path:
        raise ModelNotFoundError(f"there is no directory {name!r}", "check the path to the checkpoint")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
    except ImportError as error:  # pragma: no cover - transformers depends on it
        raise ModelNotFoundError(f"there is no directory {name!r}", "check the path to the checkpoint") from error
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(f"{name!r} is no directory, nor in the local Hugging Face cache", hint) from error
    except (HFValidationError, OSError, ValueError) as error:
        raise ModelNotFoundError(f"{name!r} cannot be found: {error}", hint) from error


def file_key(directory: Path, **load_options: str) -> bytes:
    """Digest the identity, not the content, of a checkpoint's files, and of how they are loaded.

    A file counts by name, size, inode, device, and times of modification and of status change: a file replaced by
    another of the same size and modification time gives another key, as nobody can set the status change time.

    Parameters
    ----------
    directory : the checkpoint; links are followed, as the Hugging Face cache is made of them.
    load_options : all that decides what is loaded from the files: dtype, transformers version, adapter path and so on.

    Returns
    -------
    bytes, 32

    Raises
    ------
    ModelNotFoundError
        The directory cannot be read, or a link in it leads nowhere.

    Notes
    -----
    Cost: one ``stat`` a file, some 10 µs. Thread safe. Hidden files, READMEs and licences do not count. Inode numbers
    and times are one machine's affair, so its name is in the key; on a network filesystem that reports stale
    attributes, so can the key be. An adapter that lives elsewhere needs a key of its own among ``load_options``.
    """
    root = Path(os.path.realpath(directory))
    h = FieldHasher("promptdb/files/1").field("machine", platform.node()).field("path", os.fsencode(root))
    for name in sorted(load_options):
        h.field("option", name).field("value", load_options[name])
    try:
        files = sorted(_regular_files(root, "", frozenset()))
    except OSError as error:
        raise ModelNotFoundError(f"cannot read {directory}: {error}", "check that it is complete") from error
    h.field("files", len(files))
    for relative, status in files:
        h.field("name", os.fsencode(relative)).field("size", status.st_size)
        h.field("mtime_ns", status.st_mtime_ns).field("ctime_ns", status.st_ctime_ns)
        h.field("inode", str(status.st_ino)).field("device", str(status.st_dev))  # unsigned 64-bit: as text
    return h.digest()


def _regular_files(root: Path, prefix: str, above: frozenset[tuple[int, int]]) -> list[tuple[str, os.stat_result]]:
    found = []
    here = root.stat()
    if (here.st_dev, here.st_ino) in above:  # a link to a directory that holds it
        return []
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in _IGNORED_NAMES:
                continue
            status = entry.stat()  # follows links; a broken one raises
            if stat.S_ISDIR(status.st_mode):
                found += _regular_files(
                    Path(entry.path), f"{prefix}{entry.name}/", above | {(here.st_dev, here.st_ino)}
                )
            elif stat.S_ISREG(status.st_mode):
                found.append((prefix + entry.name, status))
    return found


def describe(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's ``config.json``, for messages and checks before torch is imported.

    Returns
    -------
    dict
        The fields of the file; ``model_type`` is there and is a string.

    Raises
    ------
    ModelNotFoundError
        No directory, no ``config.json``, or one that is not a model's: the hint says which.
    """
    path = Path(directory) / "config.json"
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ModelNotFoundError(f"{path} has {path.stat().st_size} bytes", "that is no model configuration")
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        if (Path(directory) / "adapter_config.json").is_file():
            hint = "this is an adapter: give the base model, and the adapter separately"
        else:
            hint = "give a directory made by save_pretrained or hf download"
        raise ModelNotFoundError(f"{directory} has no config.json", hint) from None
    except NotADirectoryError:
        raise ModelNotFoundError(f"{directory} is not a directory", "give the directory of the checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise ModelNotFoundError(f"{path} is not valid JSON: {error}", "download the checkpoint again") from error
    except OSError as error:
        raise ModelNotFoundError(f"cannot read {path}: {error}", "check its permissions") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ModelNotFoundError(f"{path} names no model_type", "give a transformers checkpoint")
    return fields


def tokenizer_files_present(directory: Path) -> bool:
    """Whether a tokenizer lies beside the model: any of the files that transformers loads one from."""
    return any((Path(directory) / name).is_file() for name in _TOKENIZER_FILES)


def adapter_base(directory: Path) -> Path | None:
    """Return the directory of the model that an adapter checkpoint adapts, or None if it is no adapter.

    Raises
    ------
    ModelNotFoundError
        The adapter's configuration cannot be read, or its model is not on this machine.
    """
    path = directory / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error!r}", "save the adapter again") from error
    return resolve(str(base))
