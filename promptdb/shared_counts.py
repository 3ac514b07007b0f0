"""What a store had of the one that it shares, in all processes since it was created: counted in memory, written now and
then, and when a process is done with it; a crash loses the last counts, nothing else."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace

from promptdb.errors import CorruptDataError
from promptdb.format import META, pack_record, unpack_record
from promptdb.tables import Reader, Writer

SHARED_COUNTS_KEY = b"shared_counts"

_FAILURE_CHARACTERS = 500


@dataclass
class Counts:
    """What was done with a shared store.

    Attributes
    ----------
    lookups, hits : prompts looked up there, and those of which it had more than the local store.
    round_trips : of those lookups.
    tokens_fetched, bytes_fetched : that came from there and were stored here.
    spans_sent, bytes_sent : that were new there.
    rejected : entries and values that were not what they should be, or not signed by somebody trusted.
    lost : values that were gone, wholly or in part.
    skipped : lookups and fetches not made because computing is faster.
    too_large : spans that the far side should not hold.
    waits, waited_s : times, and seconds in all, that somebody else was waited for, who computed the same.
    """

    lookups: int = 0
    hits: int = 0
    round_trips: int = 0
    tokens_fetched: int = 0
    bytes_fetched: int = 0
    spans_sent: int = 0
    bytes_sent: int = 0
    rejected: int = 0
    lost: int = 0
    skipped: int = 0
    too_large: int = 0
    waits: int = 0
    waited_s: float = 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of the lookups that were hits; None before the first."""
        return self.hits / self.lookups if self.lookups else None

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(Counts)})

    def __sub__(self, other: Counts) -> Counts:
        return Counts(**{each.name: getattr(self, each.name) - getattr(other, each.name) for each in fields(Counts)})


@dataclass(frozen=True)
class SharedTotals:
    """Sums over processes.

    Attributes
    ----------
    counts : what was done.
    failures : how often the far side failed.
    last_failure, last_failure_unix_s : the last of these, and when it was written; empty and 0 without any.
    """

    counts: Counts = field(default_factory=Counts)
    failures: int = 0
    last_failure: str = ""
    last_failure_unix_s: float = 0.0

    def add(self, other: SharedTotals) -> SharedTotals:
        """Return these and later ones together."""
        later = other if other.failures else self
        return replace(later, counts=self.counts + other.counts, failures=self.failures + other.failures)


def write_shared_counts(writer: Writer, totals: SharedTotals) -> None:
    """Add counts to those that are stored. What is stored and does not hold is begun anew."""
    data = writer.get(META, SHARED_COUNTS_KEY)
    before = SharedTotals()
    if data is not None:
        with suppress(CorruptDataError):
            before = unpack_shared_counts(data)
    total = before.add(totals)
    found = {
        **asdict(total.counts),
        "failures": total.failures,
        "last_failure": total.last_failure[:_FAILURE_CHARACTERS],
        "last_failure_unix_s": total.last_failure_unix_s,
    }
    writer.put(META, SHARED_COUNTS_KEY, pack_record(SHARED_COUNTS_KEY, found))


def unpack_shared_counts(data: memoryview | bytes) -> SharedTotals:
    """Return stored counts. Raises :class:`~promptdb.errors.CorruptDataError`."""
    found = unpack_record(SHARED_COUNTS_KEY, data)
    numbers = {**asdict(Counts()), "failures": 0, "last_failure_unix_s": 0.0}
    for name, zero in numbers.items():
        amount = found.get(name, zero)
        if type(amount) not in (int, float) or not amount >= 0:
            raise CorruptDataError(f"the count {name} of the shared store is {amount!r}", "`promptdb verify --fix`")
        numbers[name] = type(zero)(amount)
    failure, failures, when = found.get("last_failure", ""), numbers.pop("failures"), numbers.pop("last_failure_unix_s")
    if not isinstance(failure, str):
        raise CorruptDataError("the last failure of the shared store is no text", "`promptdb verify --fix`")
    return SharedTotals(Counts(**numbers), failures, failure, when)


def read_shared_counts(reader: Reader) -> SharedTotals:
    """Return what is stored; nothing if it does not hold: it is a hint."""
    data = reader.get(META, SHARED_COUNTS_KEY)
    if data is None:
        return SharedTotals()
    try:
        return unpack_shared_counts(data)
    except CorruptDataError:
        return SharedTotals()
