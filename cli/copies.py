"""``promptdb backup`` and ``check``: copies of whole stores, and files of others before they are used."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from promptdb.archive import BrokenArchiveError, check_archive
from promptdb.backup import backup as back_up
from promptdb.backup import check_store
from promptdb.db import PromptDB
from promptdb.migrate import migrate as migrate_store
from promptdb.opening import default_path

from .archive import PIPE, entries, file_size, opened, progress_bar
from .options import store_options
from .output import count, print_fields, print_json, print_line, print_table, size
from .texts import printable

_MOST_SHOWN = 50


@click.command(short_help="Copy the whole store while others use it.")
@click.argument("directory", type=click.Path())
@click.option("--compact", is_flag=True, help="Leave out unused pages: slower, and smaller.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Read the copy and check all of it.")
@store_options
def backup(directory: str, compact: bool, verify: bool, path: str | None, as_json: bool) -> None:
    """Copy the whole store while others use it.

    DIRECTORY is created, private to you, and is a store itself: open it with --db. It holds the state of one moment.
    The copy of an encrypted store is encrypted with the same key.

    \b
    Examples:
      promptdb backup /backups/monday.promptdb
      promptdb backup --compact --no-verify copy.promptdb --json
    """
    with PromptDB(path, readonly=True) as db:
        report = back_up(db, directory, compact=compact, verify=verify)
    if as_json:
        print_json({"directory": directory, "is_verified": verify, **asdict(report)})
    else:
        what = f": {count(report.num_spans, 'span')}, everything holds" if verify else ", not verified"
        print_line(f"{directory}: {size(report.num_bytes)} copied{what}.")


@click.command(short_help="Bring a store of an older format up to date.")
@click.option("--keep", is_flag=True, help="Keep the old file beside the new one.")
@store_options
def migrate(path: str | None, as_json: bool, keep: bool) -> None:
    """Bring a store of an older format up to date.

    Older stores can be read, and are not written to. The new file is made beside the old one, checked whole, and then
    takes its place at once; interrupted, the store is as it was. Nobody else may have it open.

    \b
    Example:
      promptdb migrate --db old.promptdb --keep
    """
    directory = default_path() if path is None else Path(path)
    report = migrate_store(directory, keep=keep)
    if as_json:
        print_json({**asdict(report), "kept": None if report.kept is None else str(report.kept)})
    elif report.from_version == report.to_version:
        print_line(f"{directory} is of format version {report.to_version}: nothing to do.")
    else:
        print_line(
            f"{directory}: format version {report.from_version} before, {report.to_version} now; everything holds."
        )
        if report.num_removed:
            print_line(f"{count(report.num_removed, 'damaged span')} left out.")
        if report.kept is not None:
            print_line(f"The old file is {report.kept}.")


@click.command(short_help="Check a store or an exported file of others before it is used.")
@click.argument("path", type=click.Path(allow_dash=True))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def check(path: str, as_json: bool) -> None:
    """Check a store or an exported file of others before it is used.

    PATH is the directory of a store, a file that `promptdb export` wrote, or '-' for such a file on standard input.
    The pages of a store are read without LMDB first, which trusts its files and can crash on one made to crash it.
    Nobody may write to the store meanwhile, nor between the check and its use. An encrypted one needs its key.

    Exit code: 0 if all holds, 1 if something does not, 2 if it is neither a store nor an exported file.

    \b
    Examples:
      promptdb check downloaded.promptdb
      promptdb check demo.promptdb-archive --json
    """
    if path != PIPE and Path(path).is_dir():
        _check_store(path, as_json)
    else:
        _check_file(path, as_json)


def _check_store(path: str, as_json: bool) -> None:
    problems, num_spans = check_store(path)
    if as_json:
        found = [asdict(problem) for problem in problems]
        print_json({"is_sound": not problems, "num_nodes": num_spans, "problems": found})
    elif problems:
        rows = [(each.table, each.key[:16], printable(each.what)) for each in problems[:_MOST_SHOWN]]
        print_table(("table", "key", "problem"), rows)
        print_line(f"{count(len(problems), 'problem')}. Do not use this store.")
    else:
        print_line(f"{count(num_spans, 'span')}: everything holds.")
    click.get_current_context().exit(1 if problems else 0)


def _check_file(path: str, as_json: bool) -> None:
    broken = ""
    with opened(path) as stream:
        try:
            with progress_bar("read", file_size(path)) as progress:
                report = check_archive(stream, progress=progress)
        except BrokenArchiveError as error:
            report, broken = error.report, error.message
    if as_json:
        print_json({"is_sound": not broken, "problem": broken, **asdict(report)})
    else:
        fields = {
            "spans": f"{report.num_spans:,}, {count(report.num_tokens, 'token')}",
            "logits": f"after {count(report.num_logits, 'position')}",
            "size": size(report.num_bytes),
        }
        if report.num_activations:
            fields["recorded"] = entries(report.num_activations)
        print_fields({**fields, **{f"model {key[:8]}": name or "?" for key, name in report.models.items()}})
        print_line(printable(broken) if broken else "Everything holds.")
    click.get_current_context().exit(1 if broken else 0)
