"""Sending spans to the shared store: what is there is left as it is, and what goes beyond it is added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from blake3 import blake3

from promptdb.errors import CorruptDataError
from promptdb.events import note, warn
from promptdb.far import FarStore, TooLargeError, check_not_sealed, joined
from promptdb.far_calls import FarCalls
from promptdb.far_index import Entry, logits_key, root_key, span_key, value_key
from promptdb.format import TOTALS, pack_root
from promptdb.keys import PrefixHasher, Root, common_prefix
from promptdb.parcel import Parcel
from promptdb.signing import Signer

# Each turn, what is left of a span begins later, or somebody else was faster.
_MOST_TURNS = 64


@dataclass(frozen=True)
class PushReport:
    """What became of parcels: those that were new on the far side, and their bytes; the others were there."""

    num_sent: int = 0
    bytes_sent: int = 0
    num_present: int = 0
    num_too_large: int = 0

    def __add__(self, other: PushReport) -> PushReport:
        return PushReport(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))


class Pusher:
    """Sends to one far store. Thread safe.

    Parameters
    ----------
    signer : signs every entry; None: nobody does.
    """

    def __init__(self, calls: FarCalls, signer: Signer | None) -> None:
        self._calls, self.signer = calls, signer
        self._known_roots: set[bytes] = set()
        self._has_told_size = False

    def push(self, parcels: Sequence[Parcel], *, logits_only: bool = False) -> PushReport:
        """Send what the far side lacks of parcels.

        Parameters
        ----------
        logits_only : the parcels are :func:`promptdb.parcel.load_logits`: only their logits are wanted.

        Raises
        ------
        SharedError
            The far side fails. What was sent is whole; send all of it again.
        """
        report = PushReport()
        self._announce({parcel.root.digest: parcel.root for parcel in parcels})
        waiting = [(self._logits_key(each) if logits_only else _key(each), each) for each in parcels]
        lost_races: list[tuple[str, Parcel]] = []
        for _ in range(_MOST_TURNS):
            if not waiting:
                break
            self._clear_unreadable([key for key, _ in lost_races])
            new, again, logits, present = self._compare(waiting, logits_only=logits_only)
            sent, lost_races = self._send(new)
            report += sent + PushReport(num_present=present)
            waiting = again + lost_races
            if logits:
                report += self.push(logits, logits_only=True)
        counts = self._calls.counts
        counts.spans_sent += report.num_sent if not logits_only else 0
        counts.bytes_sent += report.bytes_sent if not logits_only else 0
        counts.too_large += report.num_too_large
        return report

    def _clear_unreadable(self, keys: Sequence[str]) -> None:
        """Take out what keeps entries from being created and cannot be read either: it was damaged on the far side."""
        if keys:
            found = self._calls.read(lambda far: far.get(keys))
            unreadable = [key for key, pieces in zip(keys, found, strict=True) if pieces is None]
            if unreadable:
                self._calls.write(partial(_delete, unreadable))

    @staticmethod
    def _logits_key(parcel: Parcel) -> str:
        digest = PrefixHasher(parcel.root.digest, parcel.packed).at(parcel.record.end)
        return logits_key(parcel.root.digest, digest)

    def _announce(self, roots: dict[bytes, Root]) -> None:
        """Enter roots, so that others can list what is there."""
        new = {digest: root for digest, root in roots.items() if digest not in self._known_roots}
        if new:
            if not self._calls.options.key and not self._known_roots:
                self._calls.write(check_not_sealed)
            items = [(root_key(root), pack_root(root, dict.fromkeys(TOTALS, 0))) for root in new.values()]
            self._calls.write(lambda far: far.put(items))
            self._known_roots |= set(new)

    def _compare(
        self, waiting: Sequence[tuple[str, Parcel]], *, logits_only: bool
    ) -> tuple[list[tuple[str, Parcel]], list[tuple[str, Parcel]], list[Parcel], int]:
        """Return what is new, what goes on beyond what is there, logits that are not there, and how many are."""
        keys = [key for key, _ in waiting]
        found = self._calls.read(lambda far: far.get(keys))
        new, again, there, logits = [], [], [], []
        for (key, parcel), pieces in zip(waiting, found, strict=True):
            entry = None if pieces is None else self._entry(key, joined(pieces))
            if entry is None:
                new.append((key, parcel))
                continue
            shared = common_prefix(entry.span, parcel.record.span)
            if shared < parcel.record.num_tokens:
                rest = parcel.cut(parcel.record.start + shared, parcel.record.end)
                again.append((_key(rest), rest))
            else:
                there.append((key, parcel, entry))
                if not logits_only:
                    lacking = [at for at, _ in parcel.logits if at not in entry.logits]
                    logits += [parcel.cut(at - 1, at) for at in lacking]
        values = [value_key(entry.value) for _, _, entry in there]
        whole = self._calls.read(lambda far: far.exists(values)) if values else []
        gone = [
            (key, parcel, entry) for (key, parcel, entry), is_whole in zip(there, whole, strict=True) if not is_whole
        ]
        for key, parcel, entry in gone:
            self._calls.write(partial(_delete, [key, value_key(entry.value)]))
            new.append((key, parcel))
        return new, again, logits, len(there) - len(gone)

    def _entry(self, key: str, data: bytes) -> Entry | None:
        try:
            return Entry.unpack(key, data)
        except CorruptDataError:
            self._calls.write(partial(_delete, [key]))
            return None

    def _send(self, parcels: Sequence[tuple[str, Parcel]]) -> tuple[PushReport, list[tuple[str, Parcel]]]:
        """Send values, then their entries; return what was sent, and those that somebody else sent meanwhile."""
        if not parcels:
            return PushReport(), []
        put = self._calls.many([partial(_put_value, parcel) for _, parcel in parcels])
        entries, kept = [], []
        for (key, parcel), (digest, size_bytes, does_fit) in zip(parcels, put, strict=True):
            if not does_fit:
                self._tell_size(parcel, size_bytes)
                continue
            positions = tuple(position for position, _ in parcel.logits)
            record = parcel.record
            entry = Entry(parcel.node, record.start, record.span, positions, digest, size_bytes)
            entries.append((key, self._signed(key, entry).pack(key)))
            kept.append((key, parcel, size_bytes))
        created = self._calls.write(lambda far: far.put(entries)) if entries else []
        won = [size for (_, _, size), is_new in zip(kept, created, strict=True) if is_new]
        lost = [(key, parcel) for (key, parcel, _), is_new in zip(kept, created, strict=True) if not is_new]
        return PushReport(len(won), sum(won), 0, len(parcels) - len(kept)), lost

    def _signed(self, key: str, entry: Entry) -> Entry:
        if self.signer is None:
            return entry
        signature = self.signer.sign(entry.message(key))
        return Entry(**{**vars(entry), "public_key": self.signer.public_key, "signature": signature})

    def _tell_size(self, parcel: Parcel, size_bytes: int) -> None:
        say = note if self._has_told_size else warn
        self._has_told_size = True
        message = (
            f"span {parcel.node.hex()[:12]} of {size_bytes} bytes is too large for the shared store, and stays here"
        )
        say("shared_too_large", message, node=parcel.node.hex(), size_bytes=size_bytes)


def _key(parcel: Parcel) -> str:
    return span_key(parcel.root.digest, parcel.record.child_hash, parcel.record.span)


def _put_value(parcel: Parcel, far: FarStore) -> tuple[bytes, int, bool]:
    """Send a parcel's value, unless it should not be held there; return its digest, its size, and whether it is there.

    Packed here, so that some are made while others are on their way.
    """
    value = parcel.pack()
    digest = blake3(value).digest()
    try:
        far.put([(value_key(digest), value)])
    except TooLargeError:
        return digest, len(value), False
    return digest, len(value), True


def _delete(keys: Sequence[str], far: FarStore) -> None:
    far.delete(keys)
