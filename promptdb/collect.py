"""Collecting by hand: what has expired, what nobody can find any more, and what is over a target."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from promptdb.errors import CorruptDataError
from promptdb.eviction import collect_expired, evict
from promptdb.format import ACTIVATIONS, BLOBS, CHILDREN, LIFE, LOGITS, NODES
from promptdb.keys import DIGEST_BYTES
from promptdb.ledger import Ledger, with_ledger
from promptdb.life import Life, read_usage
from promptdb.pins import drop_old_labels
from promptdb.snapshot import logits_owner
from promptdb.tables import Index, Reader

# Others write between two transactions of a collection.
BATCH_NODES = 1000
ALL = 1 << 62

Step = Callable[[Ledger], int]


@dataclass
class GcReport:
    """What a collection removed, or would remove.

    Attributes
    ----------
    num_expired, num_orphans, num_evicted : spans that had expired, that stood on nothing, that were over the target.
    num_leftovers : blobs, logits and entries of indexes that belonged to no span.
    num_labels : pins and tags that had ended, or whose span was gone.
    freed_bytes, charged_bytes : what the store was charged for all that, and what it is charged now.
    is_dry_run : whether nothing was removed.
    """

    num_expired: int = 0
    num_orphans: int = 0
    num_evicted: int = 0
    num_leftovers: int = 0
    num_labels: int = 0
    freed_bytes: int = 0
    charged_bytes: int = 0
    is_dry_run: bool = False

    def add(self, name: str, count: int, freed_bytes: int, charged_bytes: int) -> None:
        """Count what one step has removed."""
        setattr(self, name, getattr(self, name) + count)
        self.freed_bytes += freed_bytes
        self.charged_bytes = charged_bytes


class _DryRunError(Exception):
    """Undoes a transaction that was only to be counted."""


def collect(index: Index, clock: Callable[[], float], target_bytes: int | None, *, dry_run: bool) -> GcReport:
    """Remove what has expired, orphans and leftovers; then evict down to ``target_bytes``. See :meth:`PromptDB.gc`."""
    report = GcReport(is_dry_run=dry_run)
    if not dry_run:
        with index.read() as reader:
            steps = _steps(reader, target_bytes, BATCH_NODES)
        for name, step in steps:
            while True:
                found = with_ledger(index, clock(), lambda ledger, step=step: _measured(ledger, step))  # type: ignore[misc]
                report.add(name, *found)
                if not found[0]:
                    break
        return report

    def undone(ledger: Ledger) -> None:
        report.__init__(is_dry_run=True)  # type: ignore[misc]  # the transaction may be tried again
        for name, step in _steps(ledger.writer, target_bytes, ALL):
            report.add(name, *_measured(ledger, step))
        raise _DryRunError

    with suppress(_DryRunError):
        with_ledger(index, clock(), undone)
    return report


def _measured(ledger: Ledger, step: Step) -> tuple[int, int, int]:
    """Return what a step removed, the bytes that it freed, and those that are still charged."""
    before = ledger.usage.charged_bytes
    count = step(ledger)
    ledger.write()
    return count, before - ledger.usage.charged_bytes, ledger.usage.charged_bytes


def _steps(reader: Reader, target_bytes: int | None, batch: int) -> list[tuple[str, Step]]:
    """Return the steps with the field of the report that each counts in; each is repeated until it finds nothing."""
    lost, leftovers = _lost(reader), list(_leftovers(reader))
    steps: list[tuple[str, Step]] = [
        ("num_labels", drop_old_labels),
        ("num_expired", lambda ledger: collect_expired(ledger, max_nodes=batch)),
        ("num_orphans", lambda ledger: _remove_lost(ledger, lost, batch)),
        ("num_leftovers", lambda ledger: _remove_leftovers(ledger, leftovers)),
    ]
    if target_bytes is not None:
        goal = target_bytes
        steps.append(("num_evicted", lambda ledger: evict(ledger, enough_bytes=goal, goal_bytes=goal, max_nodes=batch)))
    steps.append(("num_labels", drop_old_labels))  # of what went just now
    return steps


def _lost(reader: Reader) -> list[bytes]:
    """Return the spans that cannot be found because one that they stand on is gone.

    One pass over ``life``, about 3 microseconds a node, and none if the totals say that there are no orphans.
    """
    usage = read_usage(reader)
    if usage is None or not usage.num_orphans:
        return []
    standing: dict[bytes, list[bytes]] = defaultdict(list)
    known = set()
    for node, data in reader.scan(LIFE):
        known.add(node)
        try:
            standing[Life.unpack(node, data).parent].append(node)
        except CorruptDataError:
            continue
    waiting = [node for parent, nodes in standing.items() if parent and parent not in known for node in nodes]
    lost = []
    while waiting:
        node = waiting.pop()
        lost.append(node)
        waiting += standing.get(node, ())
    return lost


def _remove_lost(ledger: Ledger, lost: Sequence[bytes], batch: int) -> int:
    """Remove up to ``batch`` of the spans that are still lost: somebody may have put what they stand on."""
    removed = 0
    for node in lost:
        if removed >= batch:
            break
        life, above = ledger.life(node), node
        while life is not None and life.parent:
            above = life.parent
            life = ledger.life(above)
        if life is None and above != node:
            removed += _remove(ledger, node)
    return removed


def _remove(ledger: Ledger, node: bytes) -> bool:
    try:
        return ledger.remove(node)
    except CorruptDataError:
        return False  # `verify --fix` takes it out


def _leftovers(reader: Reader) -> Iterator[tuple[str, bytes]]:
    """Yield (table, key) of what belongs to no span. About 3 microseconds an entry."""
    for key in reader.keys(BLOBS):
        if reader.size(NODES, key[:DIGEST_BYTES]) is None:
            yield BLOBS, key
    for key in reader.keys(ACTIVATIONS):
        if reader.size(NODES, key[:DIGEST_BYTES]) is None:
            yield ACTIVATIONS, key
    for key, value in reader.scan(CHILDREN):
        if reader.size(NODES, bytes(value[:DIGEST_BYTES])) is None:
            yield CHILDREN, key
    for key, value in reader.scan(LOGITS):
        if reader.size(NODES, logits_owner(value)) is None:
            yield LOGITS, key


def _remove_leftovers(ledger: Ledger, leftovers: Sequence[tuple[str, bytes]]) -> int:
    """Remove those of ``leftovers`` that still are: somebody may have put their span."""
    standing = set(_leftovers(ledger.writer)) if leftovers else set()
    return sum(ledger.writer.delete(table, key) for table, key in leftovers if (table, key) in standing)
