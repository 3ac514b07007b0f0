"""``promptdb ls`` and ``promptdb show``: the stored spans one by one."""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Iterator
from typing import Any

import click

from promptdb.db import PromptDB
from promptdb.errors import CorruptDataError, NodeNotFoundError
from promptdb.format import NodeRecord
from promptdb.keys import prefix_digests, unpack_tokens
from promptdb.snapshot import Snapshot
from promptdb.trie import children

from .failure import Failure
from .known import find_weights
from .options import store_options
from .output import age, approximate, count, duration, print_fields, print_json, print_line, print_table, size
from .texts import Decoders, head, quoted

SHORT_ID = 12
MODEL_HELP = "Only of this model: its directory, its name, or the start of its weights ID."
_TEXT_WIDTH = 40

# Smallest first; `ls` shows the newest and the largest first.
_SORT_KEYS: dict[str, Callable[[bytes, NodeRecord], Any]] = {
    "age": lambda node, record: (-record.created_unix_s, record.start, node),
    "size": lambda node, record: (-record.size_bytes, record.start, node),
    "tokens": lambda node, record: (-record.num_tokens, record.start, node),
    "start": lambda node, record: (record.start, node),
    "id": lambda node, record: node,
}


@click.command(short_help="List stored spans.")
@store_options
@click.option("--model", metavar="M", help=MODEL_HELP)
@click.option("--tag", metavar="NAME", help="Only of prompts that have this tag.")
@click.option(
    "--limit", metavar="N", type=click.IntRange(0), default=50, show_default=True, help="At most N spans; 0 for all."
)
@click.option(
    "--sort", type=click.Choice(list(_SORT_KEYS)), default="age", show_default=True, help="Newest, largest first."
)
def ls(path: str | None, as_json: bool, model: str | None, tag: str | None, limit: int, sort: str) -> None:
    """List stored spans: ID, weights, where the span starts in its prompt, tokens, bytes, age and text.

    \b
    Examples:
      promptdb ls --limit 10
      promptdb ls --model demo --sort size --json
      promptdb ls --tag evaluation
    """
    with PromptDB(path, readonly=True) as db:
        chosen = None if model is None else find_weights(db, model)
        tagged = None if tag is None else db.tagged(tag)
        total = 0

        def counted() -> Iterator[tuple[bytes, NodeRecord]]:
            nonlocal total
            for node, record in db.nodes():
                if (chosen is None or record.root.weights_id in chosen) and (tagged is None or node in tagged):
                    total += 1
                    yield node, record

        key = _SORT_KEYS[sort]
        shown = (
            heapq.nsmallest(limit, counted(), key=lambda item: key(*item))
            if limit
            else sorted(counted(), key=lambda item: key(*item))
        )
        decoders = Decoders(db)
        spans = [_summary(node, record, decoders) for node, record in shown]
    if as_json:
        print_json({"num_nodes": total, "nodes": spans})
        return
    if not spans:
        print_line("Nothing is stored.")
        return
    rows = [
        (
            span["node"][:SHORT_ID],
            span["weights_id"][:8] + (f" ≈{span['kv_codec']}" if span["kv_codec"] else ""),
            f"{span['start']:,}",
            f"{span['num_tokens']:,}",
            size(span["size_bytes"]),
            age(span["created_unix_s"]),
            head(span["text"], _TEXT_WIDTH),
        )
        for span in spans
    ]
    print_table(("node", "weights", ">start", ">tokens", ">size", ">age", "text"), rows)
    if total > len(spans):
        print_line(f"{len(spans):,} of {count(total, 'span')}; --limit 0 shows all.")


def _summary(node: bytes, record: NodeRecord, decoders: Decoders) -> dict[str, Any]:
    return {
        "node": node.hex(),
        "weights_id": record.root.weights_id,
        "tokenizer_id": record.root.tokenizer_id,
        "namespace": record.root.namespace,
        "intervention_id": record.root.intervention_id,
        "kv_codec": record.root.kv_codec,
        "start": record.start,
        "num_tokens": record.num_tokens,
        "size_bytes": record.size_bytes,
        "created_unix_s": record.created_unix_s,
        "text": decoders.text(record.root, record.span),
    }


@click.command(short_help="Show all that is known of a stored span, and check it.")
@click.argument("node")
@store_options
def show(node: str, path: str | None, as_json: bool) -> None:
    """Show all that is known of a stored span, and check it.

    NODE is a node ID as `promptdb ls` prints it, or the start of one. Prints the record, the shapes of its tensors, how
    it was computed, and its text; checksums are verified.

    Exit code: 0 if the span is sound, 1 if there is none, 2 if it is damaged.

    \b
    Example:
      promptdb show 3f2a91
    """
    with PromptDB(path, readonly=True, verify_reads="always") as db:
        found = _describe(db, find_node(db, node))
    if as_json:
        print_json(found)
    else:
        _print(found)
    if found["problems"]:
        raise Failure(
            f"span {found['node'][:SHORT_ID]} is damaged: {'; '.join(found['problems'])}",
            f"`promptdb rm {found['node'][:SHORT_ID]}`, then compute the prompt again",
        )


def find_node(db: PromptDB, text: str) -> bytes:
    """Return the ID of the one node whose ID starts with ``text``.

    Raises
    ------
    Failure
        Not a node ID, or so little of one that it must be an accident, such as an empty variable in a script.
    NodeNotFoundError
        None starts so, or several do.
    """
    if not re.fullmatch("[0-9a-fA-F]{4,64}", text):
        raise Failure(f"{text!r} is no node ID", "give 4 or more hexadecimal digits of one; `promptdb ls` lists them")
    return db.find_node(text)


def _describe(db: PromptDB, node: bytes) -> dict[str, Any]:
    with db.read() as snapshot:
        record = snapshot.record(node)
        if record is None:
            raise NodeNotFoundError(f"node {node.hex()} was removed just now", "`promptdb ls` lists them")
        prefix = db.prefix(snapshot, record)
        problems: list[str] = []
        found = _summary(node, record, Decoders(db)) | {
            "end": record.end,
            "parent": record.parent.hex(),
            "child_hash": record.child_hash.hex(),
            "root": record.root.digest.hex(),
            "is_reachable": prefix is not None,
            "compute_s": record.compute_s,
            "provenance": dict(record.provenance),
            "token_ids": list(unpack_tokens(record.span)),
            "blobs": [_blob(snapshot, node, record, kind, problems) for kind in sorted(record.blobs)],
            "logits_after": [],
            "children": [],
            "problems": problems,
        }
        if prefix is None:
            return found
        # A span that is attached at `start` is a sibling; those at later positions stand on this one.
        positions = range(record.start + 1, record.end + 1)
        for position, digest in zip(positions, prefix_digests(record.root.digest, prefix, positions), strict=True):
            try:
                if snapshot.logits(digest) is not None:
                    found["logits_after"].append(position)
            except CorruptDataError as error:
                problems.append(error.message)
            found["children"] += [child.hex() for child, _ in children(snapshot.reader, digest)]
    return found


def _blob(snapshot: Snapshot, node: bytes, record: NodeRecord, kind: str, problems: list[str]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    try:
        tensors = snapshot.blob(node, record, kind) or {}
        problem = ""
    except CorruptDataError as error:
        problem = error.message
        problems.append(problem)
    return {
        "kind": kind,
        "size_bytes": record.blobs[kind].size_bytes,
        "checksum": record.blobs[kind].checksum.hex(),
        "is_sound": not problem,
        "tensors": {name: {"dtype": view.dtype, "shape": list(view.shape)} for name, view in tensors.items()},
    }


def _print(found: dict[str, Any]) -> None:
    fields = {
        "node": found["node"],
        "weights": found["weights_id"],
        "tokenizer": found["tokenizer_id"],
        "namespace": found["namespace"],
        "intervention": found["intervention_id"],
        "approximate": approximate(found["kv_codec"]) if found["kv_codec"] else "",
        "positions": f"[{found['start']:,}, {found['end']:,}), {count(found['num_tokens'], 'token')}",
        "stands on": found["parent"] or "the start of the prompt",
        "continued by": ", ".join(child[:SHORT_ID] for child in found["children"]),
        "logits after": ", ".join(map(str, found["logits_after"])) + " tokens" if found["logits_after"] else "",
        "reachable": "yes" if found["is_reachable"] else "no: a span before it was removed",
        "stored": f"{age(found['created_unix_s'])} ago",
        "computed in": duration(found["compute_s"]),
        **{name.replace("_", " "): str(value) for name, value in found["provenance"].items()},
        "text": quoted(found["text"]),
    }
    print_fields({name: value for name, value in fields.items() if value})
    rows = []
    for blob in found["blobs"]:
        for name, tensor in blob["tensors"].items() or [("", None)]:
            shape = " × ".join(map(str, tensor["shape"])) if tensor else ""
            state = "sound" if blob["is_sound"] else "DAMAGED"
            rows.append((blob["kind"], size(blob["size_bytes"]), state, name, tensor["dtype"] if tensor else "", shape))
    print_line("")
    print_table(("blob", ">size", "checksum", "tensor", "dtype", "shape"), rows)
