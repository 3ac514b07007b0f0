"""Pins and tags in a transaction: what a pin protects, and what happens when one ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from promptdb.format import LABELS
from promptdb.labels import KINDS, PIN, Label, next_pin_end, read_labels
from promptdb.ledger import Ledger


def add_label(ledger: Ledger, label: Label) -> None:
    """Store a label, in place of one of the same kind, name and span; a pin then holds its path."""
    is_known = ledger.writer.get(LABELS, label.key) is not None
    label.write(ledger.writer)
    if label.kind != PIN:
        return
    if is_known:  # it may end earlier now
        _settle(ledger, set(ledger.path(label.node)))
        return
    ledger.pin(label.node, label.expires_unix_s)
    ledger.usage.next_pin_unix_s = min(ledger.usage.next_pin_unix_s, label.expires_unix_s)


def remove_labels(ledger: Ledger, labels: Iterable[Label]) -> int:
    """Remove labels; what no other pin holds may then be evicted. Return how many there were."""
    paths: set[bytes] = set()
    count = 0
    for label in labels:
        count += ledger.writer.delete(LABELS, label.key)
        if label.kind == PIN:
            paths.update(ledger.path(label.node))
    if count:
        _settle(ledger, paths)
    return count


def drop_expired_pins(ledger: Ledger) -> None:
    """Take off the pins that have ended. Costs nothing while there are none."""
    if ledger.usage.next_pin_unix_s > ledger.now:
        return
    pins = list(read_labels(ledger.writer, PIN))
    remove_labels(ledger, [label for label in pins if label.expires_unix_s <= ledger.now])


def drop_old_labels(ledger: Ledger) -> int:
    """Remove pins and tags that have ended or whose span is gone; return how many there were."""
    labels = [label for kind in KINDS for label in read_labels(ledger.writer, kind)]
    return remove_labels(
        ledger, [label for label in labels if label.expires_unix_s <= ledger.now or ledger.life(label.node) is None]
    )


def remove_spans(ledger: Ledger, nodes: Sequence[bytes], *, labels_too: bool) -> int:
    """Remove spans by hand; the first is the one that the others stand on. Return how many there were.

    ``labels_too``: and the pins and tags that end at them. Otherwise, those hold again when the spans are stored again.
    What the spans stood on is held only by pins that still reach it.
    """
    held: set[bytes] = set()
    for node in nodes:
        for each in ledger.path(node):
            life = ledger.life(each)
            if each in held or life is None or not life.pinned_unix_s:
                break
            held.add(each)
    if labels_too and next(ledger.writer.keys(LABELS), None) is not None:
        for label in [each for node in nodes for kind in KINDS for each in read_labels(ledger.writer, kind, node)]:
            ledger.writer.delete(LABELS, label.key)
    removed = sum(map(ledger.remove, reversed(nodes)))
    if held:
        _settle(ledger, held.difference(nodes))
    return removed


def _settle(ledger: Ledger, nodes: set[bytes]) -> None:
    """Find out when the last pin on each of ``nodes`` ends, from all pins. Microseconds a span of their paths."""
    ends = dict.fromkeys(nodes, 0.0)
    if nodes:
        for label in read_labels(ledger.writer, PIN):
            for node in ledger.path(label.node):
                if node in ends:
                    ends[node] = max(ends[node], label.expires_unix_s)
        for node, until_unix_s in ends.items():
            ledger.set_pinned(node, until_unix_s)
    ledger.usage.next_pin_unix_s = next_pin_end(ledger.writer)
