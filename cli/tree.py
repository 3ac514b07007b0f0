"""``promptdb tree``: the stored spans, each under the one that it stands on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

from promptdb.db import PromptDB
from promptdb.keys import TOKEN_BYTES, PrefixHasher, Root, num_tokens
from promptdb.snapshot import Snapshot
from promptdb.trie import children

from .known import find_weights
from .nodes import MODEL_HELP, SHORT_ID
from .options import store_options
from .output import count, print_json, print_line, size
from .texts import Decoders, head

_TEXT_WIDTH = 60


@click.command(short_help="Draw the stored spans as a tree.")
@store_options
@click.option("--model", metavar="M", help=MODEL_HELP)
@click.option("--depth", metavar="N", type=click.IntRange(0), default=0, help="At most N levels; by default all.")
@click.option(
    "--limit", metavar="N", type=click.IntRange(0), default=200, show_default=True, help="At most N spans; 0 for all."
)
def tree(path: str | None, as_json: bool, model: str | None, depth: int, limit: int) -> None:
    """Draw the stored spans as a tree.

    One tree for each identity (weights, tokenizer, namespace); each span stands under the one that it continues, with
    its first position, length, size and text.

    \b
    Examples:
      promptdb tree --depth 2
      promptdb tree --model demo --json
    """
    with PromptDB(path, readonly=True) as db, db.read() as snapshot:
        chosen = None if model is None else find_weights(db, model)
        roots = [(root, totals) for root, totals in db.roots() if chosen is None or root.weights_id in chosen]
        decoders = Decoders(db)
        trees = []
        for root, totals in roots:
            shown, is_cut = _walk(snapshot, root, decoders, depth, limit)
            name = str((db.registry.model(root.weights_id) or {}).get("name", ""))
            trees.append(_document(root, name, totals, shown, is_cut))
    if as_json:
        print_json({"roots": trees})
        return
    if not trees:
        print_line("Nothing is stored.")
    for number, each in enumerate(trees):
        if number:
            print_line("")
        _print(each)


@dataclass(frozen=True)
class Branch:
    """A span in the tree, at ``depth`` below the root (0 for the starts of prompts)."""

    depth: int
    node: bytes
    parent: bytes
    start: int
    num_tokens: int
    size_bytes: int
    text: str


def _walk(snapshot: Snapshot, root: Root, decoders: Decoders, depth: int, limit: int) -> tuple[list[Branch], bool]:
    """Return the spans that can be reached from a root, parents before children, and whether some were left out."""
    shown: list[Branch] = []
    is_cut = False
    waiting = [(b"", _children(snapshot, root, b"", -1))]
    while waiting:
        parent, following = waiting[-1]
        item = next(following, None)
        if item is None:
            waiting.pop()
            continue
        if (limit and len(shown) == limit) or (depth and len(waiting) > depth):
            is_cut = True
            waiting.pop()
            continue
        start, node, longer = item
        record = snapshot.record(node)
        size_bytes = record.size_bytes if record is not None else 0
        span = longer[start * TOKEN_BYTES :]
        text = decoders.text(root, span)
        shown.append(Branch(len(waiting) - 1, node, parent, start, num_tokens(span), size_bytes, text))
        waiting.append((node, _children(snapshot, root, longer, start)))
    return shown, is_cut


def _children(snapshot: Snapshot, root: Root, tokens: bytes, start: int) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield (start, node, all tokens to its end) of the spans attached after ``start``, up to the end of ``tokens``."""
    hasher = PrefixHasher(root.digest, tokens)
    for position in range(start + 1, num_tokens(tokens) + 1):
        for node, span in children(snapshot.reader, hasher.at(position)):
            yield position, node, tokens[: position * TOKEN_BYTES] + span


def _document(root: Root, name: str, totals: dict[str, int], shown: Sequence[Branch], is_cut: bool) -> dict[str, Any]:
    return {
        "root": root.digest.hex(),
        "model_name": name,
        "weights_id": root.weights_id,
        "tokenizer_id": root.tokenizer_id,
        "namespace": root.namespace,
        "intervention_id": root.intervention_id,
        "kv_codec": root.kv_codec,
        **totals,
        "is_cut": is_cut,
        "spans": [
            {
                "node": branch.node.hex(),
                "parent": branch.parent.hex(),
                "depth": branch.depth,
                "start": branch.start,
                "num_tokens": branch.num_tokens,
                "size_bytes": branch.size_bytes,
                "text": branch.text,
            }
            for branch in shown
        ],
    }


def _print(document: dict[str, Any]) -> None:
    labels = [f"weights {document['weights_id'][:8]}", f"tokenizer {document['tokenizer_id'][:8]}"]
    optional = {
        "namespace": document["namespace"],
        "intervention": document["intervention_id"],
        "approximate": document["kv_codec"],
    }
    labels += [f"{name} {value}" for name, value in optional.items() if value]
    totals = (
        count(document["num_nodes"], "span"),
        count(document["num_tokens"], "token"),
        size(document["blob_bytes"]),
    )
    print_line((document["model_name"] or "?", "bold"), f"  {', '.join(labels)}: {', '.join(totals)}")
    spans = document["spans"]
    for span, guide in zip(spans, guides([each["depth"] for each in spans]), strict=True):
        print_line(
            (guide, "dim"),
            (span["node"][:SHORT_ID], "cyan"),
            f"  {span['start']:,}+{span['num_tokens']:,}  ",
            (size(span["size_bytes"]), "dim"),
            f"  {head(span['text'], _TEXT_WIDTH)}",
        )
    missing = document["num_nodes"] - len(spans)
    if document["is_cut"]:
        print_line((f"… {missing:,} more; --depth 0 --limit 0 shows all", "dim"))
    elif missing:
        print_line((f"{count(missing, 'span')} more cannot be reached: a span before was removed", "dim"))


def guides(depths: Sequence[int]) -> list[str]:
    """Return the lines to draw before each item of a tree that is given as depths, parents before children."""
    found = []
    is_open: set[int] = set()  # levels that have another item further down
    for depth in reversed(depths):
        bars = "".join("│   " if level in is_open else "    " for level in range(depth))
        found.append(bars + ("├── " if depth in is_open else "└── "))
        is_open = {level for level in is_open if level < depth} | {depth}
    return found[::-1]
