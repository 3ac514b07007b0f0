"""``promptdb export`` and ``import``: moving representations between stores."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, BinaryIO

import click

from promptdb.archive import (
    BrokenArchiveError,
    ExportReport,
    ImportOptions,
    ImportReport,
    Selection,
    export_nodes,
    import_archive,
)
from promptdb.db import PromptDB
from promptdb.frames import NO_ARCHIVE, starts_like_an_archive
from promptdb.incoming import DEFAULT_MAX_BLOB_BYTES
from promptdb.streams import source

from .failure import Failure
from .known import UnknownModelError, find_weights
from .nodes import MODEL_HELP, find_node
from .options import store_options
from .output import count, print_json, print_line, size

PIPE = "-"
_FILE = click.Path(dir_okay=False, allow_dash=True)


@click.command("export", short_help="Write spans to a file that another store can import.")
@click.argument("file", type=_FILE)
@click.argument("node", required=False)
@click.option("--model", metavar="M", help=MODEL_HELP)
@click.option("--namespace", metavar="NAME", help="Only of this namespace; '' is the one without a name.")
@click.option("--tag", metavar="NAME", help="Only of prompts that have this tag.")
@click.option("--without-prefix", is_flag=True, help="With NODE: leave out the spans that it stands on.")
@click.option("--without-activations", is_flag=True, help="Leave out what `promptdb record` recorded.")
@click.option("--force", is_flag=True, help="Replace FILE.")
@store_options
def export(
    file: str,
    node: str | None,
    model: str | None,
    namespace: str | None,
    tag: str | None,
    without_prefix: bool,
    without_activations: bool,
    force: bool,
    path: str | None,
    as_json: bool,
) -> None:
    """Write spans to a file that another store can import.

    FILE is a file, or '-' for standard output. With NODE, a node ID as `promptdb ls` prints it: that span, all that
    continues it, and the spans that it stands on. Otherwise everything, or what the options choose. Others may use the
    store meanwhile. Damaged spans are left out.

    FILE is written as FILE.part first, and appears when it is complete. It is neither compressed nor encrypted,
    whatever the store is.

    Exit code: 0 if all was written, 1 if something was left out or there was nothing, 2 for errors.

    \b
    Examples:
      promptdb export everything.promptdb-archive
      promptdb export --model demo demo.promptdb-archive
      promptdb export --tag evaluation evaluation.promptdb-archive
      promptdb export branch.promptdb-archive 3f2a91
      promptdb export - | ssh elsewhere promptdb import -
    """
    if node is None and without_prefix:
        raise click.UsageError("--without-prefix goes with NODE")
    if node is not None and (model is not None or namespace is not None or tag is not None):
        raise click.UsageError("NODE is one span, and what goes on from it: no --model, --namespace or --tag beside it")
    to_pipe = file == PIPE
    if to_pipe and sys.stdout.isatty():
        raise Failure("an archive is not for a terminal", "name a FILE, or pipe it into another command")
    with PromptDB(path, readonly=True) as db:
        selection = Selection(
            node=None if node is None else find_node(db, node),
            weights_ids=None if model is None else frozenset(find_weights(db, model)),
            namespace=namespace,
            tag=tag,
            with_prefix=not without_prefix,
            with_activations=not without_activations,
        )
        chosen = [amounts["blob_bytes"] for root, amounts in db.roots() if selection.wants(root)]
        with progress_bar("written", sum(chosen) if node is None and tag is None else None) as progress:
            target: str | BinaryIO = sys.stdout.buffer if to_pipe else file
            report = export_nodes(db, selection, target, overwrite=force, progress=progress)
            sys.stdout.buffer.flush()
    _print_export(report, file, as_json)
    incomplete = report.num_damaged or report.num_damaged_entries or not report.num_spans
    click.get_current_context().exit(1 if incomplete else 0)


def _print_export(report: ExportReport, file: str, as_json: bool) -> None:
    if as_json:
        _print_json(asdict(report), to_stderr=file == PIPE)
        return
    lines = [
        f"{count(report.num_spans, 'span')}, {count(report.num_tokens, 'token')}, {size(report.num_bytes)} written to "
        f"{'standard output' if file == PIPE else file}."
    ]
    if report.num_activations:
        lines.append(f"{entries(report.num_activations)} among them.")
    if report.num_damaged_entries:
        lines.append(f"{entries(report.num_damaged_entries, 'damaged ')} left out: `promptdb verify --fix`.")
    if report.num_damaged:
        lines.append(
            f"{count(report.num_damaged, 'damaged span')} left out, with what stands on them: `promptdb verify --fix`."
        )
    for line in lines:
        click.echo(line, err=file == PIPE)


def entries(number: int, kind: str = "") -> str:
    """Return ``2 entries of recorded activations``."""
    return f"{number:,} {kind}{'entry' if number == 1 else 'entries'} of recorded activations"


@click.command("import", short_help="Store what an exported file holds.")
@click.argument("file", type=_FILE)
@click.option("--only-model", metavar="M", multiple=True, help="A model's name, or the start of its weights ID.")
@click.option("--only-tokenizer", metavar="ID", multiple=True, help="The start of a tokenizer's ID.")
@click.option("--namespace", metavar="NAME", help="Move everything into this namespace.")
@click.option("--without-activations", is_flag=True, help="Leave out recorded activations.")
@click.option(
    "--max-blob-bytes",
    metavar="N",
    type=click.IntRange(1),
    default=DEFAULT_MAX_BLOB_BYTES,
    show_default=True,
    help="Refuse larger blobs.",
)
@store_options
def import_(
    file: str,
    only_model: Sequence[str],
    only_tokenizer: Sequence[str],
    namespace: str | None,
    without_activations: bool,
    max_blob_bytes: int,
    path: str | None,
    as_json: bool,
) -> None:
    """Store what an exported file holds.

    FILE is a file that `promptdb export` wrote, or '-' for standard input. The store is created if there is none. What
    it has already is skipped, so that an import that was interrupted goes on when it is started again.

    Nothing in the file is believed: digests, checksums, sizes and tensors are checked before anything is stored.
    Whether the numbers are those of the model cannot be told: import from those whom you would let compute for you.

    Exit code: 0 if everything is stored now, 1 if something was left out, 2 if the file is damaged. What came before
    the damage is stored then.

    \b
    Examples:
      promptdb import everything.promptdb-archive
      promptdb import --only-model 5d41 everything.promptdb-archive --json
      promptdb import --namespace alice demo.promptdb-archive
      zstd -dc demo.zst | promptdb import -
    """
    with opened(file) as stream, PromptDB(path) as db:
        options = ImportOptions(
            _model_filter(db, only_model),
            _id_filter(only_tokenizer, "tokenizer"),
            namespace,
            max_blob_bytes,
            with_activations=not without_activations,
        )
        try:
            with progress_bar("read", file_size(file)) as progress:
                report = import_archive(db, stream, options, progress=progress)
        except BrokenArchiveError as error:
            if as_json:
                print_json(asdict(error.report))
            raise
        where = str(db.path)
    if as_json:
        print_json(asdict(report))
    else:
        _print_import(report, where)
    nothing = bool(report.spans_filtered) and not report.spans_stored and not report.spans_present
    click.get_current_context().exit(1 if report.spans_dropped or report.activations_dropped or nothing else 0)


def _print_import(report: ImportReport, where: str) -> None:
    stored = f"{count(report.spans_stored, 'span')}, {count(report.tokens_stored, 'token')}"
    print_line(f"{where}: stored {stored}, {size(report.bytes_stored)}.")
    if report.activations_stored:
        print_line(f"{entries(report.activations_stored)} stored.")
    facts = (
        (report.spans_present, "span", "there already"),
        (report.spans_filtered, "span", "of other models or tokenizers left out"),
        (report.spans_dropped, "span", "left out, as what they continue is neither in the file nor in the store"),
        (
            report.tokenizers_unchecked,
            "tokenizer",
            "left out, as the ID cannot be checked: using the model here enters it",
        ),
    )
    if report.activations_dropped:
        print_line(f"{entries(report.activations_dropped)} left out, as their span is.")
    for number, noun, what in facts:
        if number:
            print_line(f"{count(number, noun)} {what}.")


# Files and filters


@contextmanager
def opened(file: str) -> Iterator[BinaryIO]:
    """Open an archive; what is none is refused before a store is created for it."""
    if file == PIPE and (sys.stdin is None or sys.stdin.isatty()):
        raise Failure("there is no archive on standard input", "name a FILE, or pipe one in")
    with source(sys.stdin.buffer if file == PIPE else file) as stream:
        if not starts_like_an_archive(stream):
            raise Failure(f"{file}: {NO_ARCHIVE}", "`promptdb export` writes one")
        yield stream


def file_size(file: str) -> int | None:
    """Return the size of a file in bytes, or None if it is none."""
    try:
        return os.stat(file).st_size if file != PIPE else None  # noqa: PTH116 - the name may be one of a descriptor
    except OSError:
        return None


def _model_filter(db: PromptDB, models: Sequence[str]) -> Callable[[str], bool]:
    """Return whether a weights ID is one of those that a person may mean; names are those that the store knows."""
    starts, known = [model for model in models if _is_start(model)], set()
    for model in models:
        if model not in starts:
            try:
                known |= find_weights(db, model)
            except UnknownModelError as error:
                raise Failure(
                    error.message, "give the start of its weights ID: `promptdb check` shows it", 1
                ) from error
    by_start = _id_filter(starts, "model")
    return (lambda identity: identity in known or (bool(starts) and by_start(identity))) if models else by_start


def _id_filter(starts: Sequence[str], what: str) -> Callable[[str], bool]:
    """Return whether an ID starts as one of some; with none, every ID does."""
    for start in starts:
        if not _is_start(start):
            raise Failure(f"{start!r} is no {what} ID", "give 4 or more hexadecimal digits of one: `promptdb models`")
    lower = tuple(start.lower() for start in starts)
    return (lambda identity: identity.startswith(lower)) if lower else (lambda identity: True)


def _is_start(text: str) -> bool:
    return re.fullmatch("[0-9a-fA-F]{4,64}", text) is not None


@contextmanager
def progress_bar(verb: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """Yield what is to be called with the bytes done; shows a bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # What the program prints is its output, and must not end up on stderr.
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda done: bar.update(task, completed=done)


def _print_json(document: dict[str, Any], *, to_stderr: bool) -> None:
    if not to_stderr:
        print_json(document)
        return
    import json

    click.echo(json.dumps(document), err=True)
