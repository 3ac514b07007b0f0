"""``promptdb limits``, ``gc``, ``compact``, ``pin``, ``unpin`` and ``pins``: what goes, and what stays."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from promptdb.db import PromptDB
from promptdb.keys import Root
from promptdb.labels import PIN, TAG, Label
from promptdb.life import COMPRESSIONS, POLICIES

from .failure import Failure
from .known import find_model
from .nodes import SHORT_ID, find_node
from .options import DTYPES, store_options
from .output import count, duration, print_fields, print_json, print_line, print_table, size, span_of_time
from .quantities import duration_option, size_option
from .store import describe_limits
from .texts import Decoders, head

_TEXT_WIDTH = 50


@click.command(short_help="Show or set the quota, what is evicted first, how long spans live, and compression.")
@store_options
@click.option("--quota", metavar="SIZE", callback=size_option, help="Most that the store may hold: 20GB; or none.")
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    help="What goes first: what saves least time per byte (cost), was idle for longest (lru), is oldest (fifo); with "
    "ttl nothing but what has expired.",
)
@click.option("--ttl", metavar="TIME", callback=duration_option, help="How long spans live from now on: 7d; or none.")
@click.option("--namespace", default="", metavar="NAME", help="The namespace that --ttl is for.")
@click.option(
    "--compression",
    type=click.Choice(COMPRESSIONS),
    help="How tensors are stored from now on: with zstd, losslessly smaller where that saves enough.",
)
def limits(
    path: str | None,
    as_json: bool,
    quota: int | None,
    policy: str | None,
    ttl: float | None,
    namespace: str,
    compression: str | None,
) -> None:
    """Show or set the quota, what is evicted first, how long spans live, and compression.

    All processes that use the store obey at once. What is over a new quota is evicted now: spans on which nothing
    stands, first those that have expired. --ttl is for what is stored from now on in a namespace, --compression for
    all that is stored from now on; older versions of promptdb cannot open the store after --compression zstd.

    \b
    Examples:
      promptdb limits
      promptdb limits --quota 20GB --policy lru
      promptdb limits --ttl 7d --namespace experiments
      promptdb limits --compression zstd
      promptdb limits --quota none
    """
    is_set = any(option is not None for option in (quota, policy, ttl, compression))
    with PromptDB(path, readonly=not is_set) as db:
        if quota is not None or policy is not None:
            db.set_quota(quota, policy=policy)
        if compression is not None:
            db.set_compression(compression)
        if ttl is not None:
            db.set_ttl(None if math.isinf(ttl) else ttl, namespace=namespace)
        found: dict[str, Any] = {**asdict(db.limits()), **db.usage(), "ttl_s": db.ttls()}
    if as_json:
        print_json(found)
        return
    print_fields({name: value for name, value in describe_limits(found).items() if value})


@click.command(short_help="Remove what has expired or cannot be found any more, and evict down to a size.")
@store_options
@click.option("--dry-run", is_flag=True, help="Remove nothing, only tell.")
@click.option(
    "--to", "target", metavar="SIZE", callback=size_option, help="Evict until the store holds no more than this."
)
def gc(path: str | None, as_json: bool, dry_run: bool, target: int | None) -> None:
    """Remove what has expired or cannot be found any more, and evict down to a size.

    Without --to, nothing that a lookup would find is removed. What is pinned stays. The file does not shrink: its pages
    are used again, and `promptdb compact` gives them back.

    \b
    Examples:
      promptdb gc --dry-run
      promptdb gc --to 10GB
    """
    with PromptDB(path) as db:
        report = db.gc(target, dry_run=dry_run)
    if as_json:
        print_json(asdict(report))
        return
    parts = [
        f"{number:,} {noun}{'' if number == 1 else 's'}{which}"
        for number, noun, which in (
            (report.num_expired, "span", " that expired"),
            (report.num_orphans, "span", " that stood on nothing"),
            (report.num_evicted, "span", " over the size"),
            (report.num_leftovers, "leftover", ""),
            (report.num_labels, "pin", " or tag that ended"),
        )
        if number
    ]
    print_line(f"{'Would remove' if dry_run else 'Removed'} {', '.join(parts) or 'nothing'}.")
    print_line(f"{size(report.freed_bytes)} {'would be ' if dry_run else ''}freed, {size(report.charged_bytes)} held.")


@click.command(short_help="Give unused space of the file back to the disk.")
@store_options
def compact(path: str | None, as_json: bool) -> None:
    """Give unused space of the file back to the disk.

    Writes the store anew beside the old file, checks all of it, and puts it into the old one's place at once. No other
    process may have the store open. Needs as much free disk as the store uses. `promptdb gc` before it gives more.

    \b
    Example:
      promptdb compact
    """
    began = time.perf_counter()
    with PromptDB(path) as db:
        report = db.compact()
    elapsed_s = time.perf_counter() - began
    if as_json:
        print_json({**report._asdict(), "elapsed_s": elapsed_s})
    else:
        print_line(f"{size(report.before_bytes)} before, {size(report.after_bytes)} now, in {duration(elapsed_s)}.")


@click.command(short_help="Protect prompts from eviction and expiry for a time.")
@click.argument("what", nargs=-1, metavar="NODE|TEXT...")
@store_options
@click.option("--tag", metavar="NAME", help="All prompts that have this tag.")
@click.option("--model", metavar="M", envvar="PROMPTDB_MODEL", help="Take the arguments as the text of one prompt.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="What its weights are.")
@click.option("--namespace", default="", metavar="NAME", help="The prompt's namespace.")
@click.option(
    "--expires", metavar="TIME", callback=duration_option, default="30d", show_default=True, help="For how long."
)
@click.option("--name", default="", metavar="NAME", help="To find the pins by.")
def pin(
    what: Sequence[str],
    path: str | None,
    as_json: bool,
    tag: str | None,
    model: str | None,
    dtype: str,
    namespace: str,
    expires: float,
    name: str,
) -> None:
    """Protect prompts from eviction and expiry for a time.

    NODE is a node ID as `promptdb ls` prints it, or the start of one: the span and all that it stands on are held. With
    --model, the arguments are the text of a prompt, and what is stored of it is held. A pin ends: after 30 days unless
    --expires says otherwise.

    \b
    Examples:
      promptdb pin 3f2a91 --expires 90d --name "system prompt"
      promptdb pin --tag evaluation
      promptdb pin --model demo "Return the number"
    """
    if not what and tag is None:
        raise Failure("nothing is named to pin", "give node IDs, --tag, or --model and a text")
    with PromptDB(path) as db:
        if model is not None and what:
            known = find_model(db, model, dtype, namespace)
            labels = [db.pin(known.root, known.tokenize(tuple(what)).packed, expires_s=expires, name=name)]
        else:
            labels = [db.pin_node(find_node(db, node), expires_s=expires, name=name) for node in what]
        if tag is not None:
            tagged = [db.pin_node(label.node, expires_s=expires, name=name) for label in db.tags(tag)]
            if not tagged:
                raise Failure(f"nothing stored has the tag {tag!r}", "`promptdb pins` lists tags", exit_code=1)
            labels += tagged
        found = [_described(db, label) for label in labels]
    if as_json:
        print_json({"pins": found})
        return
    for label in labels:
        print_line(
            f"{label.node.hex()[:SHORT_ID]}: {count(label.num_tokens, 'token')} held for {span_of_time(expires)}."
        )


@click.command(short_help="Take pins off.")
@click.argument("nodes", nargs=-1, metavar="[NODE]...")
@store_options
@click.option("--name", metavar="NAME", help="All pins of this name.")
def unpin(nodes: Sequence[str], path: str | None, as_json: bool, name: str | None) -> None:
    """Take pins off.

    NODE is the span that a pin was put on, as `promptdb pins` prints it. Nothing is removed: what was held may be
    evicted from now on. Exit code 1 if there was no such pin.

    \b
    Examples:
      promptdb unpin 3f2a91
      promptdb unpin --name "system prompt"
    """
    if not nodes and name is None:
        raise Failure("no pin is named", "give node IDs or --name; `promptdb pins` lists them")
    with PromptDB(path) as db:
        if nodes:
            removed = sum(db.unpin(node=find_node(db, node), name=name) for node in nodes)
        else:
            removed = db.unpin(name=name)
    if as_json:
        print_json({"pins_removed": removed})
    else:
        print_line(f"Took off {count(removed, 'pin')}.")
    click.get_current_context().exit(0 if removed else 1)


@click.command(short_help="List pins and tags.")
@store_options
def pins(path: str | None, as_json: bool) -> None:
    """List pins and tags: on which span they end, how much of a prompt that is, and how long they hold.

    \b
    Example:
      promptdb pins
    """
    with PromptDB(path, readonly=True) as db:
        labels = [*db.pins(), *db.tags()]
        found = [_described(db, label) for label in labels]
    if as_json:
        print_json({"pins": [each for each in found if each["kind"] == PIN],
                    "tags": [each for each in found if each["kind"] == TAG]})  # fmt: skip
        return
    if not found:
        print_line("There are no pins and no tags.")
        return
    rows = [
        (
            each["kind"],
            each["name"],
            each["node"][:SHORT_ID],
            f"{each['num_tokens']:,}",
            "as the span" if math.isinf(each["expires_unix_s"]) else span_of_time(each["expires_unix_s"] - time.time()),
            head(each["text"], _TEXT_WIDTH),
        )
        for each in found
    ]
    print_table(("kind", "name", "node", ">tokens", ">holds", "last span"), rows)


def _described(db: PromptDB, label: Label) -> dict[str, Any]:
    with db.read() as snapshot:
        record = snapshot.record(label.node)
    root = Root("", "") if record is None else record.root
    return {
        "kind": label.kind,
        "name": label.name,
        "node": label.node.hex(),
        "weights_id": root.weights_id,
        "namespace": root.namespace,
        "num_tokens": label.num_tokens,
        "created_unix_s": label.created_unix_s,
        "expires_unix_s": label.expires_unix_s,
        "text": "" if record is None else Decoders(db).text(root, record.span),
    }
