"""Copies of whole stores: made while others write, and checked before they are trusted."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from promptdb.db import PromptDB
from promptdb.errors import CorruptDataError, StoreError
from promptdb.filesystem import refuse_remote, sync_directory
from promptdb.format import META
from promptdb.verify import Problem

PAGES = "pages"
_DATA_FILE = "data.mdb"
_PART = _DATA_FILE + ".part"


@dataclass(frozen=True)
class BackupReport:
    """What was copied. ``num_spans`` is -1 if the copy was not verified."""

    num_bytes: int
    num_spans: int


def backup(
    db: PromptDB, directory: str | os.PathLike[str], *, compact: bool = False, verify: bool = True
) -> BackupReport:
    """Copy a store as it is at one moment, while others read and write.

    Parameters
    ----------
    directory : where the copy goes; created, private to the user. What an interrupted backup left there is replaced;
        anything else is refused.
    compact : leave out pages that are not in use. Slower, and the copy is smaller.
    verify : check the pages, records, blobs and index of the copy.

    Raises
    ------
    StoreError
        The directory is not empty, is on a network filesystem or full, or the store is in memory.
    CorruptDataError
        The copy does not hold, and nor does the store then: it is left in place, for ``promptdb check``.

    Notes
    -----
    As fast as the disk writes. The directory is a store when this returns, and not before. Thread safe. Other processes
    are not stopped, except for an instant at the start; the map of this process cannot grow meanwhile.
    """
    target = Path(directory)
    part = target / _PART
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        refuse_remote(target)
        others = sorted(entry.name for entry in target.iterdir() if entry.name != _PART)
        if others:
            raise StoreError(f"{target} is not empty: it holds {others[0]}", "name a new directory")
        part.unlink(missing_ok=True)
        db._index.copy(part, compact=compact)
        part.rename(target / _DATA_FILE)
        sync_directory(target)
        num_bytes = (target / _DATA_FILE).stat().st_size
    except StoreError:
        part.unlink(missing_ok=True)
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"{target} cannot be written: {reason}", "name a new directory on a local disk") from error
    if not verify:
        return BackupReport(num_bytes, -1)
    problems, num_spans = check_store(target, key=db._user_key or b"")
    if problems:
        raise CorruptDataError(
            f"the copy in {target} does not hold: {len(problems):,} problems, the first: {problems[0].what}",
            "look at both with `promptdb check`; `promptdb verify --fix` removes what is damaged",
        )
    return BackupReport(num_bytes, num_spans)


def check_store(path: str | os.PathLike[str], *, key: str | bytes | None = None) -> tuple[list[Problem], int]:
    """Check a store that nobody vouches for, before it is opened. Does not use its lock file.

    First the pages of the data file, without LMDB: a file made for the purpose can make LMDB crash, or worse. If they
    hold, every record, blob and index entry, as :meth:`PromptDB.verify`.

    Parameters
    ----------
    path : directory of the store. Nobody may have it open for writing meanwhile. It is not changed, but for zeros at
        the end of a file that is shorter than its own page count.
    key : as for :class:`PromptDB`; without that of an encrypted store, only its pages are checked before this raises.

    Returns
    -------
    problems, num_spans
        No problems if all holds. The result says nothing about what the file is when it has been changed since, nor
        whether the numbers in it are those of a model.

    Raises
    ------
    NotAStoreError, FormatVersionError, StoreKeyError, StoreError
        It is no store, or cannot be read.
    """
    from promptdb.pages import check_pages

    directory = Path(path)
    problems = [Problem(PAGES, "", what) for what in check_pages(directory)]
    if problems:
        return problems, 0
    with tempfile.TemporaryDirectory(prefix="promptdb-check-") as private:
        # Locks of a stranger are not believed either: LMDB makes its own beside the link.
        (Path(private) / _DATA_FILE).symlink_to((directory / _DATA_FILE).resolve())
        try:
            with PromptDB(private, readonly=True, key=key) as db:
                return db.verify(), db.stat()["num_nodes"]
        except CorruptDataError as error:
            return [Problem(META, "", error.message)], 0
        except StoreError as error:
            error.message = error.message.replace(private, str(directory))
            raise
