"""Everything at once: what a store has goes to the shared store, or what that has comes here. Can be started again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from promptdb.archive import Selection
from promptdb.errors import CorruptDataError
from promptdb.far import joined
from promptdb.far_index import LOGITS_ENTRIES, ROOTS, SPANS, Entry, root_part
from promptdb.format import LOGITS, NODES, unpack_root
from promptdb.keys import TOKEN_BYTES, Root
from promptdb.outgoing import Outgoing, prefix_of
from promptdb.parcel import Parcel, parcel_of
from promptdb.pulling import Item
from promptdb.pushing import PushReport
from promptdb.shared import Tier

if TYPE_CHECKING:
    from promptdb.db import PromptDB

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
    selection : which; see :class:`promptdb.archive.Selection`. By default all that can be found.
    progress : called with the bytes of blobs looked at so far.

    Raises
    ------
    SharedError
        The far side fails. What was sent stays: push again.
    NodeNotFoundError, CorruptDataError
        The span that was asked for is gone, or what it stands on is damaged. Other damaged spans are left out.

    Notes
    -----
    Memory: a batch of 32 MiB. Reads every span that is selected, and sends what is new.
    """
    report, looked_at = PushReport(), 0
    for batch in _batches(_parcels(db, selection or Selection())):
        report += tier.pusher.push(batch)
        looked_at += sum(parcel.record.size_bytes for parcel in batch)
        progress(looked_at)
    return report


def _batches(parcels: Iterator[Parcel]) -> Iterator[list[Parcel]]:
    batch: list[Parcel] = []
    size_bytes = 0
    for parcel in parcels:
        batch.append(parcel)
        size_bytes += parcel.record.size_bytes
        if size_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_SPANS:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch


def _parcels(db: PromptDB, selection: Selection) -> Iterator[Parcel]:
    target = None if selection.node is None else prefix_of(db, selection.node)
    tagged = None if selection.tag is None else db.tagged(selection.tag)
    for root, _ in db.roots():
        if not selection.wants(root) or (target is not None and target[0].root != root):
            continue
        outgoing = Outgoing(db, root, only=tagged)
        path = b""
        if target is None:
            spans = outgoing.everything()
        else:
            record, packed = target
            assert selection.node is not None
            spans = outgoing.subtree(selection.node, record.start, packed, with_prefix=True)
        for span in spans:
            prefix = path[: span.record.start * TOKEN_BYTES]
            path = prefix + span.record.span
            yield parcel_of(db, outgoing, span, prefix)


def pull(
    db: PromptDB,
    tier: Tier,
    wants: Callable[[Root], bool] = lambda root: True,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> PullReport:
    """Fetch everything that the shared store has and the local one has not.

    Parameters
    ----------
    wants : whether spans of a root are wanted.
    progress : called with the bytes fetched so far, and those that there are to fetch.

    Raises
    ------
    SharedError
        The far side fails. What came is stored: pull again.

    Notes
    -----
    Lists all keys of the shared store, which takes it a second for some hundred thousand. Memory: 2 kB for each span
    that is to come, and a batch of 64 MiB.
    """
    report = PullReport()
    counts = tier.calls.counts
    rejected, lost = counts.rejected, counts.lost
    items: list[Item] = []
    for root in _roots(tier):
        if wants(root):
            for prefix in (SPANS, LOGITS_ENTRIES):
                items += _missing(db, tier, f"{prefix}{root_part(root.digest)}/", report)
    # What others stand on comes first, and a span's logits after it.
    items.sort(key=lambda item: (item.key.startswith(LOGITS_ENTRIES), item.entry.start))
    total = sum(item.entry.size_bytes for item in items)

    def note(item: Item) -> None:
        report.bytes_fetched += item.entry.size_bytes
        progress(report.bytes_fetched, total)

    before = counts.tokens_fetched
    try:
        for batch in _portions(items):
            tier.puller.fetch(batch, note, _DEADLINE_S)
    finally:
        report.tokens_stored = counts.tokens_fetched - before
        report.num_rejected, report.num_lost = counts.rejected - rejected, counts.lost - lost
    return report


def _roots(tier: Tier) -> list[Root]:
    keys = sorted(tier.calls.read(lambda far: list(far.list(ROOTS)), wait_s=_DEADLINE_S))
    found = []
    for key, pieces in zip(keys, tier.calls.read(lambda far: far.get(keys)), strict=True):
        if pieces is None:
            continue
        try:
            digest = bytes.fromhex(key.removeprefix(ROOTS))
            root, _ = unpack_root(digest, joined(pieces))
        except (ValueError, CorruptDataError):
            tier.calls.counts.rejected += 1
            continue
        if root.digest == digest:
            found.append(root)
        else:
            tier.calls.counts.rejected += 1
    return found


def _missing(db: PromptDB, tier: Tier, prefix: str, report: PullReport) -> Iterator[Item]:
    keys = iter(tier.calls.read(lambda far: list(far.list(prefix)), wait_s=_DEADLINE_S))
    while page := list(islice(keys, _LIST_KEYS)):
        report.num_listed += len(page)
        entries = tier.puller.entries(page, tier.calls.read(lambda far, page=page: far.get(page)))  # type: ignore[misc]
        with db.read() as snapshot:
            for key, entry in entries.items():
                if _is_here(snapshot.reader.get, key, entry):
                    report.num_present += 1
                else:
                    yield Item(key, entry, "", entry.num_tokens)


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
