"""``promptdb push``, ``pull``, ``sync`` and ``shared``: a store and the one that a team shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import wraps
from typing import Any, NamedTuple

import click

from promptdb.archive import Selection
from promptdb.db import PromptDB
from promptdb.errors import SharedError
from promptdb.far import check_not_sealed
from promptdb.keys import Root
from promptdb.labels import check_name
from promptdb.pushing import PushReport
from promptdb.shared import Tier, connect
from promptdb.shared_counts import read_shared_counts
from promptdb.shared_options import NONE, PASSWORD_VARIABLE, store_url, stored_url, without_secrets
from promptdb.shared_sync import PullReport
from promptdb.shared_sync import pull as pull_all
from promptdb.shared_sync import push as push_all
from promptdb.signing import write_key

from .archive import progress_bar
from .failure import Failure
from .known import UnknownModelError, find_weights
from .nodes import MODEL_HELP, find_node
from .options import shared_option, store_options
from .output import count, print_fields, print_json, print_line, size
from .shared_status import describe_totals, measured, status_fields

_HEX_DIGITS = set("0123456789abcdef")


@contextmanager
def opened(path: str | None, shared: str | None, *, readonly: bool = False) -> Iterator[tuple[PromptDB, Tier]]:
    """Open a store with its shared one; failures of that one are errors here."""
    with PromptDB(path, shared=shared) as db:
        if db.shared is None:
            raise Failure("no shared store is named", "give --shared URL, or `promptdb shared set URL`")
        db.shared = replace(db.shared, required=True, readonly=db.shared.readonly or readonly)
        tier = connect(db)
        assert tier is not None
        yield db, tier


class Asked(NamedTuple):
    """Which spans a command is asked to move."""

    node: str | None
    model: str | None
    namespace: str | None
    tag: str | None

    def find_node(self, db: PromptDB) -> bytes | None:
        """Return the ID of the span that was asked for, if one was."""
        if self.node is not None and (self.model, self.namespace, self.tag) != (None, None, None):
            raise click.UsageError(
                "NODE is one span, and what goes on from it: no --model, --namespace or --tag beside it"
            )
        if self.tag is not None:
            check_name(self.tag, may_be_empty=False)
        return None if self.node is None else find_node(db, self.node)

    def selection(self, node: bytes | None, weights_ids: Iterable[str] | None) -> Selection:
        """Return what that is of a store: of this span, or of models with these weights IDs."""
        known = None if weights_ids is None else frozenset(weights_ids)
        return Selection(node=node, weights_ids=known, namespace=self.namespace, tag=self.tag)


def asking(model_help: str, tag_help: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add NODE, ``--model``, ``--namespace`` and ``--tag`` to a command, which gets them as its first argument."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def collected(
            node: str | None, model: str | None, namespace: str | None, tag: str | None, **others: Any
        ) -> None:
            command(Asked(node, model, namespace, tag), **others)

        of_namespace = "Only of this namespace; '' is the one without a name."
        collected = click.option("--tag", metavar="NAME", help=tag_help)(collected)
        collected = click.option("--namespace", metavar="NAME", help=of_namespace)(collected)
        collected = click.option("--model", metavar="M", help=model_help)(collected)
        return click.argument("node", required=False)(collected)

    return decorate


@click.command(short_help="Send spans to the shared store.")
@asking(MODEL_HELP, "Only of prompts that have this tag.")
@shared_option
@store_options
def push(asked: Asked, shared: str | None, path: str | None, as_json: bool) -> None:
    """Send spans to the shared store.

    What is there is left as it is, so a push that was interrupted is started again. With NODE, a node ID as
    `promptdb ls` prints it: that span, all that continues it, and what it stands on. What is put while a shared
    store is set goes there by itself; this is for what was put before.

    \b
    Examples:
      promptdb push --shared redis://cache.example:6379
      promptdb push --tag evaluation
      promptdb push 3f2a91 --json
    """
    PromptDB(path, readonly=True).close()  # there must be one
    with opened(path, shared) as (db, tier):
        node = asked.find_node(db)
        weights = None if asked.model is None else find_weights(db, asked.model)
        report = _push(db, tier, asked.selection(node, weights))
        where = tier.calls.far.name
    if as_json:
        print_json(asdict(report))
        return
    _print_pushed(report, where)


def _push(db: PromptDB, tier: Tier, selection: Selection) -> PushReport:
    chosen = [amounts["blob_bytes"] for root, amounts in db.roots() if selection.wants(root)]
    with progress_bar(
        "looked at", sum(chosen) if selection.node is None and selection.tag is None else None
    ) as progress:
        return push_all(db, tier, selection, progress)


def _print_pushed(report: PushReport, where: str) -> None:
    print_line(f"{where}: sent {count(report.num_sent, 'span')}, {size(report.bytes_sent)}.")
    if report.num_present:
        print_line(f"{count(report.num_present, 'span')} there already.")
    if report.num_too_large:
        print_line(
            f"{count(report.num_too_large, 'span')} too large for it: see maxmemory in `promptdb shared status`."
        )


@click.command(short_help="Fetch everything that the shared store has.")
@asking(
    "Only of this model: a directory or name known here, or the start of an ID.",
    "Only prompts that were pushed with this tag; they get it here, too.",
)
@shared_option
@store_options
def pull(asked: Asked, shared: str | None, path: str | None, as_json: bool) -> None:
    """Fetch everything that the shared store has.

    What is here is skipped, so a pull that was interrupted is started again. Everything is checked before it is stored.
    With NODE, a node ID as `promptdb ls` prints it: what continues that span. Prompts that are asked for come by
    themselves; this is for machines that will be offline, or want no delays.

    Exit code: 0 if everything is here now, 1 if something did not hold or was gone.

    \b
    Examples:
      promptdb pull --shared s3://bucket/promptdb
      promptdb pull --tag evaluation
      promptdb pull 3f2a91
      promptdb pull --model demo --json
    """
    with opened(path, shared, readonly=True) as (db, tier):
        node = asked.find_node(db)
        report = _pull(db, tier, _wanted(db, asked), node, asked.tag)
    if as_json:
        print_json(asdict(report))
    else:
        _print_pulled(report, str(db.path))
    click.get_current_context().exit(1 if report.num_rejected or report.num_lost else 0)


def _wanted(db: PromptDB, asked: Asked) -> Callable[[Root], bool]:
    model, namespace = asked.model, asked.namespace
    known: set[str] = set()
    start = "" if model is None else model.lower()
    if model is not None:
        is_start = len(start) >= 4 and set(start) <= _HEX_DIGITS
        with suppress(UnknownModelError) if is_start else _unknown_here(model):
            known = find_weights(db, model)
    return lambda root: (
        (model is None or root.weights_id in known or (len(start) >= 4 and root.weights_id.startswith(start)))
        and (namespace is None or root.namespace == namespace)
    )


@contextmanager
def _unknown_here(model: str) -> Iterator[None]:
    try:
        yield
    except UnknownModelError as error:
        raise Failure(error.message, "give the start of its weights ID: `promptdb models` shows it", 1) from error


def _pull(db: PromptDB, tier: Tier, wants: Callable[[Root], bool], node: bytes | None, tag: str | None) -> PullReport:
    with progress_bar("fetched", None) as progress:
        return pull_all(db, tier, wants, lambda done, total: progress(done), node=node, tag=tag)


def _print_pulled(report: PullReport, where: str) -> None:
    print_line(f"{where}: stored {count(report.tokens_stored, 'token')}, {size(report.bytes_fetched)} fetched.")
    if report.num_present:
        print_line(
            f"{report.num_present:,} of {count(report.num_listed, 'entry').replace('entrys', 'entries')} here already."
        )
    if report.num_rejected:
        print_line(f"{report.num_rejected:,} did not hold, or were not signed by anybody trusted.")
    if report.num_lost:
        print_line(f"{report.num_lost:,} were gone when they were fetched.")


@click.command(short_help="Send and fetch: afterwards both stores have everything.")
@asking(MODEL_HELP, "Only prompts that have this tag, here or there.")
@shared_option
@store_options
def sync(asked: Asked, shared: str | None, path: str | None, as_json: bool) -> None:
    """Send and fetch: afterwards both stores have everything.

    As `promptdb push` and then `promptdb pull`. Can be interrupted and started again.

    \b
    Examples:
      promptdb sync --shared redis://cache.example:6379
      promptdb sync --tag evaluation
      promptdb sync --namespace experiments --json
    """
    with opened(path, shared) as (db, tier):
        node, wants = asked.find_node(db), _wanted(db, asked)
        weights = None if asked.model is None else {root.weights_id for root, _ in db.roots() if wants(root)}
        sent = _push(db, tier, asked.selection(node, weights))
        fetched = _pull(db, tier, wants, node, asked.tag)
        where = tier.calls.far.name
    if as_json:
        print_json({"sent": asdict(sent), "fetched": asdict(fetched)})
    else:
        _print_pushed(sent, where)
        _print_pulled(fetched, str(db.path))
    click.get_current_context().exit(1 if fetched.num_rejected or fetched.num_lost else 0)


@click.group(short_help="Show and set up the store that is shared with other machines.")
def shared() -> None:
    """Show and set up the store that is shared with other machines.

    \b
    Examples:
      promptdb shared set redis://cache.example:6379
      promptdb shared status
      promptdb shared keygen ~/.promptdb-key.pem
    """


@shared.command("status")
@shared_option
@store_options
def status(shared: str | None, path: str | None, as_json: bool) -> None:
    """Tell whether the shared store can be reached, how fast it is, and what waits to be sent.

    Measures the round trip, and, unless it may only be read, how fast 4 MiB go there and back. Hits, and what was
    fetched and sent, are of all programs that have used this local store.

    Exit code: 0 if it answers, 1 if it does not.

    \b
    Examples:
      promptdb shared status
      promptdb shared status --shared s3://bucket/promptdb --json
    """
    with opened(path, shared) as (db, tier):
        may_write = db.shared is not None and not db.shared.readonly
        found: dict[str, Any] = {"url": tier.calls.far.name, "waiting": tier.num_waiting(), "reachable": True}
        with db.read() as snapshot:
            found |= describe_totals(read_shared_counts(snapshot.reader))
        try:
            if not tier.options.key:
                check_not_sealed(tier.calls.far)
            found |= measured(tier.calls.far, write=may_write)
        except SharedError as error:
            found |= {"reachable": False, "reason": error.message, "hint": error.hint}
    if as_json:
        print_json(found)
    else:
        print_fields(status_fields(found))
    click.get_current_context().exit(0 if found["reachable"] else 1)


@shared.command("set")
@click.argument("url")
@store_options
def set_(url: str, path: str | None, as_json: bool) -> None:
    """Remember URL in the store, for all who open it without naming another; 'none' forgets it.

    A password does not belong there: PROMPTDB_SHARED_PASSWORD is read instead.

    \b
    Examples:
      promptdb shared set "redis://team1@cache.example:6379?prefix=team1"
      promptdb shared set none
    """
    with PromptDB(path, shared=NONE) as db:
        db._index.transact(lambda writer: store_url(writer, "" if url == NONE else url))
        with db.read() as snapshot:
            kept = stored_url(snapshot.reader)
    if as_json:
        print_json({"url": kept})
    elif kept:
        print_line(f"{db.path} shares {without_secrets(kept)}. Passwords are read from {PASSWORD_VARIABLE}.")
    else:
        print_line(f"{db.path} is not shared.")


@shared.command("keygen")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def keygen(file: str, as_json: bool) -> None:
    """Write a new private key to FILE, and print the public one for those who are to trust it.

    Who writes sets PROMPTDB_SHARED_SIGN to FILE; who reads sets PROMPTDB_SHARED_TRUST to a file with public keys, one a
    line, and uses nothing that none of them has signed.

    \b
    Examples:
      promptdb shared keygen ~/.promptdb-key.pem
      promptdb shared keygen writer.pem --json
    """
    public = write_key(file)
    if as_json:
        print_json({"file": file, "public_key": public})
        return
    print_fields({"private key": f"{file}, for PROMPTDB_SHARED_SIGN", "public key": public})
