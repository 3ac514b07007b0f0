"""``promptdb rm``: remove spans."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

import click

from promptdb.db import PromptDB
from promptdb.errors import NodeNotFoundError
from promptdb.format import NodeRecord

from .failure import Failure
from .nodes import SHORT_ID, find_node
from .options import store_options
from .output import count, print_json, print_line, print_table, size
from .texts import Decoders, head

_TEXT_WIDTH = 50


@click.command(short_help="Remove spans and all that stands on them.")
@click.argument("nodes", nargs=-1, required=True, metavar="NODE...")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@store_options
def rm(nodes: Sequence[str], yes: bool, path: str | None, as_json: bool) -> None:
    """Remove spans and all that stands on them.

    NODE is a node ID as `promptdb ls` prints it, or the start of one. What continues a span cannot be used without it,
    and goes too. Says what will be removed and asks, unless --yes is given. The store's file does not shrink: its pages
    are used again.

    \b
    Examples:
      promptdb rm 3f2a91
      promptdb rm --yes 3f2a91 77c0de
    """
    with PromptDB(path) as db:
        chosen = list(dict.fromkeys(find_node(db, node) for node in nodes))
        doomed = _doomed(db, chosen)
        if not as_json:
            _print(db, doomed, set(chosen))
        if not yes:
            if as_json or not (sys.stdin and sys.stdin.isatty()):
                raise Failure("nothing was removed: there is nobody to ask", "add --yes to remove without asking")
            if not click.confirm("Remove?", default=False, err=True):
                click.get_current_context().exit(1)
        removed = 0
        for node in chosen:
            with suppress(NodeNotFoundError):  # it stood on another one, or somebody else was faster
                removed += db.remove(node)
    num_tokens, num_bytes = _sums(doomed)
    if as_json:
        print_json({"spans_removed": removed, "tokens_removed": num_tokens, "blob_bytes_removed": num_bytes})
    else:
        print_line(f"Removed {count(removed, 'span')}.")


def _doomed(db: PromptDB, chosen: Sequence[bytes]) -> dict[bytes, NodeRecord]:
    """Return the records of what will be removed: each chosen span, then what stands on it."""
    found: dict[bytes, NodeRecord] = {}
    with db.read() as snapshot:
        for node in chosen:
            for each, _ in db.subtree(snapshot, node):
                record = snapshot.record(each)
                if record is not None:
                    found[each] = record
    return found


def _sums(doomed: dict[bytes, NodeRecord]) -> tuple[int, int]:
    return sum(record.num_tokens for record in doomed.values()), sum(record.size_bytes for record in doomed.values())


def _print(db: PromptDB, doomed: dict[bytes, NodeRecord], chosen: set[bytes]) -> None:
    decoders = Decoders(db)
    rows = [
        (
            node.hex()[:SHORT_ID],
            f"{record.start:,}",
            f"{record.num_tokens:,}",
            size(record.size_bytes),
            head(decoders.text(record.root, record.span), _TEXT_WIDTH),
        )
        for node, record in doomed.items()
        if node in chosen
    ]
    print_table(("node", ">start", ">tokens", ">size", "text"), rows)
    others = len(doomed) - len(rows)
    num_tokens, num_bytes = _sums(doomed)
    more = f" and {others:,} more on top of {'it' if len(rows) == 1 else 'them'}" if others else ""
    print_line(f"{count(len(rows), 'span')}{more}: {count(num_tokens, 'token')}, {size(num_bytes)}")
