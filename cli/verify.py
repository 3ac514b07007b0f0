"""``promptdb verify``: read the whole store, and say what does not hold."""

from __future__ import annotations

import click

from promptdb.db import PromptDB

from .options import store_options
from .output import count, print_json, print_line, print_table

# Of a store that is badly damaged, the rest adds nothing.
_MOST_SHOWN = 50


@click.command(short_help="Check every record, blob and index entry of the store.")
@store_options
@click.option("--fix", is_flag=True, help="Remove what does not hold, and make the index and the totals again.")
@click.pass_context
def verify(ctx: click.Context, path: str | None, as_json: bool, fix: bool) -> None:
    """Check every record, blob and index entry of the store.

    Reads everything, about as fast as the disk goes. Exit code 0 if all holds, 1 if something did not; with --fix, what
    did not hold is then gone, and will be computed again when it is asked for.

    \b
    Examples:
      promptdb verify
      promptdb verify --fix --json
    """
    with PromptDB(path, readonly=not fix) as db:
        problems = db.verify(fix=fix)
        num_nodes = db.stat()["num_nodes"]
    if as_json:
        found = [{"table": problem.table, "key": problem.key, "what": problem.what} for problem in problems]
        print_json({"is_sound": not problems, "num_nodes": num_nodes, "is_fixed": fix, "problems": found})
    elif not problems:
        print_line(f"{count(num_nodes, 'span')}: everything holds.")
    else:
        shown = problems[:_MOST_SHOWN]
        print_table(("table", "key", "problem"), [(each.table, each.key[:16], each.what) for each in shown])
        if len(problems) > len(shown):
            print_line(f"and {len(problems) - len(shown):,} more")
        what = "Removed; the store holds now." if fix else "`promptdb verify --fix` removes what does not hold."
        print_line(f"{count(len(problems), 'problem')}. {what}")
    ctx.exit(1 if problems else 0)
