"""Everything at once: what a store has goes to the shared store, or what that has comes here. Can be started again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from promptdb.archive import Selection
from promptdb.errors import CorruptDataError, NodeNotFoundError
from promptdb.far import check_not_sealed
from promptdb.far_index import LOGITS_ENTRIES, Entry, span_key, value_key
from promptdb.format import LIFE, LOGITS, NODES, NodeRecord
from promptdb.keys import Root
from promptdb.life import Life
from promptdb.outgoing import prefix_of
from promptdb.parcel import Parcel, load_parcel
from promptdb.pulling import Item
from promptdb.pushing import PushReport
from promptdb.shared import Tier
from promptdb.shared_parts import Part, below, of_roots, tagged
from promptdb.shared_tags import Tagged, send_tags

if TYPE_CHECKING:
    from promptdb.db import PromptDB

_FIRST_BATCH_BYTES = 4 << 20
_BATCH_BYTES = 32 << 20
_BATCH_SPANS = 64
_LIST_KEYS = 1000
# Of a batch; each operation has its own timeouts besides.
_DEADLINE_S = 600.0

Progress = Callable[[int], object]


@dataclass
class PullReport:
    """What became of what lies in the shared store.

    Attributes
    ----------
    num_listed : spans and logits there, of the roots that were wanted.
    num_present : of those, here already.
    tokens_stored : new here.
    bytes_fetched : of values that came and held.
    num_rejected : entries and values that did not hold, or were not signed by somebody trusted.
    num_lost : values that were gone.
    """

    num_listed: int = 0
    num_present: int = 0
    tokens_stored: int = 0
    bytes_fetched: int = 0
    num_rejected: int = 0
    num_lost: int = 0


def push(
    db: PromptDB, tier: Tier, selection: Selection | None = None, progress: Progress = lambda num_bytes: None
) -> PushReport:
    """Send spans of a store that the shared store lacks.

    Parameters
    ----------
    selection : which; see :class:`promptdb.archive.Selection`. By default all that can be found. A tag is sent along,
        so that others can pull what has it.
    progress : called with the bytes of blobs looked at so far.

    Raises
    ------
    SharedError
        The far side fails. What was sent stays: push again.
    NodeNotFoundError, CorruptDataError
        The span that was asked for is gone, or stands on what is. Damaged spans are left out.

    Notes
    -----
    What is there is told from records alone. Memory: a batch of 32 MiB, and the next one, which is read meanwhile.
    """
    present = looked_at = 0
    report = PushReport()
    wanted: deque[bytes] = deque()
    for page in _pages(_selected(db, selection or Selection())):
        lacking = _lacking(db, tier, page)
        wanted += lacking
        present += len(page) - len(lacking)
        looked_at += sum(record.size_bytes for node, record in page if node not in lacking)
        progress(looked_at)
    with ThreadPoolExecutor(1, "promptdb-push") as ahead:
        most_bytes = _FIRST_BATCH_BYTES  # so that sending begins soon
        following = ahead.submit(_load_batch, db, wanted, most_bytes)
        while batch := following.result():
            most_bytes = min(2 * most_bytes, _BATCH_BYTES)
            following = ahead.submit(_load_batch, db, wanted, most_bytes)
            report += tier.pusher.push(batch)
            looked_at += sum(parcel.record.size_bytes for parcel in batch)
            progress(looked_at)
    if selection is not None and selection.tag is not None:
        send_tags(tier, selection.tag)
    return report + PushReport(num_present=present)


def _selected(db: PromptDB, selection: Selection) -> Iterator[tuple[bytes, NodeRecord]]:
    """Yield (node ID, record) of the spans that are selected."""
    only: Set[bytes] | None = None if selection.tag is None else db.tagged(selection.tag)
    if selection.node is not None:
        with db.read() as snapshot:
            nodes = {node for node, _ in db.subtree(snapshot, selection.node)}
            record, packed = prefix_of(db, selection.node)
            nodes |= {step.node for step in snapshot.match(record.root, packed).steps}
        only = nodes
    for node, record in db.nodes():
        if (only is None or node in only) and (selection.node is not None or selection.wants(record.root)):
            yield node, record


def _pages(found: Iterator[tuple[bytes, NodeRecord]]) -> Iterator[list[tuple[bytes, NodeRecord]]]:
    while page := list(islice(found, _LIST_KEYS)):
        yield page


def _lacking(db: PromptDB, tier: Tier, page: Sequence[tuple[bytes, NodeRecord]]) -> list[bytes]:
    """Return the spans that may not be there whole, or lack logits there; those first that others stand on."""
    keys = [span_key(record.root.digest, record.child_hash, record.span) for _, record in page]
    entries = tier.puller.entries(keys, tier.calls.read(lambda far: far.get(keys)))
    known = [key for key in keys if key in entries]
    values = [value_key(entries[key].value) for key in known]
    whole = dict(zip(known, tier.calls.read(lambda far: far.exists(values)), strict=True)) if values else {}
    lacking = []
    with db.read() as snapshot:
        for key, (node, record) in zip(keys, page, strict=True):
            entry, life = entries.get(key), snapshot.reader.get(LIFE, node)
            num_logits = len(Life.unpack(node, life).logits) if life is not None else 1 << 30
            is_there = entry is not None and entry.node == node and whole[key] and num_logits <= len(entry.logits)
            if not is_there:
                lacking.append((record.start, node))
    return [node for _, node in sorted(lacking)]


def _load_batch(db: PromptDB, wanted: deque[bytes], most_bytes: int) -> list[Parcel]:
    """Read the next spans, until they are so many bytes; those that are gone or damaged are left out."""
    batch: list[Parcel] = []
    size_bytes = 0
    while wanted and size_bytes < most_bytes and len(batch) < _BATCH_SPANS:
        try:
            batch.append(load_parcel(db, wanted.popleft()))
        except (NodeNotFoundError, CorruptDataError):
            continue
        size_bytes += batch[-1].record.size_bytes
    return batch


def pull(
    db: PromptDB,
    tier: Tier,
    wants: Callable[[Root], bool] = lambda root: True,
    progress: Callable[[int, int], object] = lambda done, total: None,
    *,
    node: bytes | None = None,
    tag: str | None = None,
) -> PullReport:
    """Fetch everything that the shared store has and the local one has not, or a part of it.

    Parameters
    ----------
    wants : whether spans of a root are wanted.
    progress : called with the bytes fetched so far, and those that there are to fetch.
    node : only what continues this span of the local store, and itself.
    tag : only prompts that :func:`push` has sent with this tag; they get it here, too.

    Raises
    ------
    SharedError
        The far side fails. What came is stored: pull again.
    NodeNotFoundError
        The local store has no such span, or not what it stands on.

    Notes
    -----
    Lists all keys of the shared store, those of the span's root, or those of the tag, which takes it a second for some
    hundred thousand. Memory: 2 kB for each span that is to come, and a batch of 64 MiB.
    """
    report = PullReport()
    counts = tier.calls.counts
    rejected, lost, before = counts.rejected, counts.lost, counts.tokens_fetched
    prompts: list[tuple[Root, Tagged]] = []
    if not tier.options.key:
        tier.calls.read(check_not_sealed)
    try:
        if tag is not None:
            prompts, items = tagged(tier, tag, wants)
            report.num_listed = len(items)
        else:
            items = _missing(db, below(tier, node) if node is not None else of_roots(tier, wants), report)
        _fetch(tier, items, report, progress)
    finally:
        report.tokens_stored = counts.tokens_fetched - before
        report.num_rejected, report.num_lost = counts.rejected - rejected, counts.lost - lost
    for root, each in prompts:
        with suppress(NodeNotFoundError):
            db.tag(tag or "", root, each.packed)
    return report


def _missing(db: PromptDB, found: Part, report: PullReport) -> list[Item]:
    """Return what is not here, page by page of what was found."""
    items: list[Item] = []
    while page := list(islice(found, _LIST_KEYS)):
        report.num_listed += len(page)
        with db.read() as snapshot:
            missing = [(key, entry) for key, entry in page if not _is_here(snapshot.reader.get, key, entry)]
        report.num_present += len(page) - len(missing)
        items += [Item(key, entry, "", entry.num_tokens) for key, entry in missing]
    return items


def _fetch(tier: Tier, items: list[Item], report: PullReport, progress: Callable[[int, int], object]) -> None:
    # What others stand on comes first, and a span's logits after it.
    items.sort(key=lambda item: (item.key.startswith(LOGITS_ENTRIES), item.entry.start))
    total = sum(item.entry.size_bytes for item in items)

    def note(item: Item) -> None:
        report.bytes_fetched += item.entry.size_bytes
        progress(report.bytes_fetched, total)

    for batch in _portions(items):
        tier.puller.fetch(batch, note, _DEADLINE_S)


def _is_here(get: Callable[[str, bytes], object], key: str, entry: Entry) -> bool:
    if key.startswith(LOGITS_ENTRIES):
        return get(LOGITS, bytes.fromhex(key.rpartition("/")[2])) is not None
    return get(NODES, entry.node) is not None


def _portions(items: Sequence[Item]) -> Iterator[list[Item]]:
    portion: list[Item] = []
    size_bytes = 0
    for item in items:
        portion.append(item)
        size_bytes += item.entry.size_bytes
        if size_bytes >= 2 * _BATCH_BYTES:
            yield portion
            portion, size_bytes = [], 0
    if portion:
        yield portion
