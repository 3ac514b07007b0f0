"""``promptdb rotate-key``: another key for an encrypted store."""

from __future__ import annotations

import click

from promptdb.db import PromptDB
from promptdb.userkey import read_key_file

from .options import store_options
from .output import print_json, print_line


@click.command("rotate-key", short_help="Let another key open an encrypted store.")
@click.argument("new_key_file", type=click.Path(dir_okay=False))
@store_options
def rotate_key(new_key_file: str, path: str | None, as_json: bool) -> None:
    """Let another key open an encrypted store.

    NEW_KEY_FILE holds the new key: 64 hexadecimal digits. The key until now comes from PROMPTDB_KEY_FILE or
    PROMPTDB_KEY, as always, and opens the store no more when this is done. Only the store's own key is encrypted anew,
    not what is stored: whoever has had the old key and a copy of the file can read what was in it then. Others may use
    the store meanwhile.

    A new key is made with: (umask 077; openssl rand -hex 32 > new.key)

    \b
    Example:
      promptdb rotate-key new.key
    """
    new_key = read_key_file(new_key_file)
    with PromptDB(path) as db:
        db.rotate_key(new_key)
        where = str(db.path)
    if as_json:
        print_json({"path": where, "is_rotated": True})
    else:
        print_line(f"{where}: the key in {new_key_file} opens it from now on, and no other.")
