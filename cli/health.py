"""``promptdb doctor`` and ``metrics``: the store seen from outside."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from promptdb.db import PromptDB
from promptdb.opening import default_path

from .options import db_option, shared_option, store_options
from .output import print_json, print_line

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


@click.command(short_help="Look for what may go wrong with the store.")
@shared_option
@store_options
@click.pass_context
def doctor(ctx: click.Context, shared: str | None, path: str | None, as_json: bool) -> None:
    """Look for what may go wrong with the store: its disk and filesystem, permissions, limits, who holds old snapshots,
    damage that was met, and versions of libraries; and with a shared one: whether it answers, takes what is sent, has
    room, and for how long its certificate holds; keys, and what waits to be sent.

    Reads no blobs, and changes nothing here: `promptdb verify` finds damage, `promptdb check` looks at a file that may
    be damaged before it is opened. To a shared store it writes a few bytes, and removes them.

    Exit code: 0 if there are neither warnings nor errors, 1 for warnings, 2 for errors.

    \b
    Examples:
      promptdb doctor
      promptdb doctor --shared redis://cache.example:6379 --json
    """
    from promptdb.doctor import examine
    from promptdb.finding import ERROR, WARNING

    findings = examine(default_path() if path is None else Path(path), shared)
    levels = {finding.level for finding in findings}
    if as_json:
        print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            print_line((f"{finding.level:>7}", _STYLES[finding.level]), f"  {finding.what}")
            if finding.hint:
                print_line(f"         {finding.hint}")
    ctx.exit(2 if ERROR in levels else 1 if WARNING in levels else 0)


@click.command(short_help="Print the store's numbers for Prometheus.")
@db_option
def metrics(path: str | None) -> None:
    """Print the store's numbers for Prometheus, in its text format: sizes, limits, evictions, hits, tokens saved.

    For node_exporter's textfile collector, or any program that scrapes a command. Needs the extra `metrics`. A program
    that has the store open registers promptdb.metrics.StoreCollector(db) instead.

    \b
    Example:
      promptdb metrics > /var/lib/node_exporter/promptdb.prom
    """
    from promptdb.metrics import exposition

    with PromptDB(path, readonly=True) as db:
        click.echo(exposition(db), nl=False)
