"""Reading the pages of a store without LMDB, which trusts its files."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

from promptdb.errors import NotAStoreError, PromptDBError, StoreError
from promptdb.lmdb_errors import DATA_FILE, LOCK_FILE, translated
from promptdb.presence import Presence, is_locked


def check_pages(path: Path) -> list[str]:
    """Read the pages of a store without LMDB, which trusts its files, and return what does not hold.

    A file that passes cannot make LMDB fail, as long as nobody changes it. Records and blobs are not looked at.

    Parameters
    ----------
    path : directory of the store. Nobody may write to it meanwhile: pages in the middle of a change look damaged.

    Raises
    ------
    NotAStoreError
        There is no data file, or a link, pipe or device in its place.
    StoreError
        The file cannot be read, or the installed lmdb has no verifier.

    Notes
    -----
    Python reads every page of the trees: some thousands a second; pages of large blobs cost almost nothing. Memory: two
    bytes a page.
    """
    try:
        from lmdb.verify import VerifyError, verify
    except ImportError as error:
        raise StoreError("this version of lmdb cannot check a file before it is opened", "install lmdb 3") from error
    check: Callable[..., list[str]] = verify
    data_file = path / DATA_FILE
    try:
        if not stat.S_ISREG(data_file.lstat().st_mode):
            raise NotAStoreError(f"{data_file} is a link, pipe or device", "copy the file itself into a new directory")
        return [str(problem) for problem in check(str(data_file), subdir=False)]
    except VerifyError as error:
        return [str(error)]
    except FileNotFoundError as error:
        raise NotAStoreError(f"there is no store at {path}", "a store is a directory with a data.mdb") from error
    except PromptDBError:
        raise
    except OSError as error:
        raise translated(error, path) from error
    except Exception as error:  # noqa: BLE001 - a file made to confuse it: trees inside of trees, for example
        return [f"it cannot be read: {error!r}"]


def check_pages_if_alone(path: Path) -> list[str] | None:
    """Check the pages of a store if nobody has it open, and keep others from opening it meanwhile.

    Returns
    -------
    list of str or None
        As :func:`check_pages`; None if somebody has it open.
    """
    try:
        presence = Presence(path)
    except OSError:
        return check_pages(path)  # which says why
    try:
        if not presence.take() or is_locked(path / LOCK_FILE):
            return None
        return check_pages(path)
    finally:
        presence.close()
