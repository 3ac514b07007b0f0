"""Fetching from the shared store what the local one lacks of prompts, checked before it is stored."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic

from blake3 import blake3

from promptdb.db import PromptDB
from promptdb.deposit import Deposit, ImportReport
from promptdb.errors import CorruptDataError, FormatVersionError, PromptDBError, SharedError
from promptdb.events import note, warn
from promptdb.far import FarStore, Pieces, joined
from promptdb.far_calls import FarCalls
from promptdb.far_index import Entry, FarStep, Walk, logits_key, value_key
from promptdb.keys import PrefixHasher, Root, num_tokens
from promptdb.parcel import unpack
from promptdb.signing import Trust

# A walk that takes longer meets spans that end where nobody can guess: the rest is computed.
_MOST_TRIPS = 64
# Where a decision against fetching is put to the test again.
_RETRY_EVERY = 20
_AUTO_THREADS_BYTES = 1 << 20
_TOUCH_EVERY_S = 60.0
_MOST_TOUCHED = 10_000


@dataclass(frozen=True)
class Want:
    """A prompt of which the local store has too little.

    Attributes
    ----------
    packed : its n packed tokens.
    boundaries : positions inside of it where pieces end.
    start : ``[0, start)`` is stored here.
    has_logits : whether the logits after those are stored here.
    """

    packed: bytes
    boundaries: Sequence[int] = ()
    start: int = 0
    has_logits: bool = False


@dataclass(frozen=True)
class Item:
    """A value to fetch."""

    key: str
    entry: Entry
    after: str  # key of the span that it stands on, if that is fetched as well
    num_tokens: int  # of it that are new here


class Puller:
    """Fetches for one local store. Thread safe.

    Parameters
    ----------
    trust : whose entries are used; None: everybody's.
    """

    def __init__(self, db: PromptDB, calls: FarCalls, trust: Trust | None) -> None:
        self._db, self._calls, self.trust = db, calls, trust
        self._num_declined = 0
        self._is_local_failure_known = False
        self._touched: dict[str, float] = {}  # key of the last ancestor -> when

    def pull(
        self,
        root: Root,
        wants: Sequence[Want],
        compute_tokens_per_s: float | None = None,
        stop: threading.Event | None = None,
    ) -> int:
        """Store here what the far side has of prompts beyond what is here; return 0 unless something may be new.

        Parameters
        ----------
        compute_tokens_per_s : how fast the model is; what is computed sooner than fetched is left there. None: not
            known, so everything is fetched.
        stop : when it is set, no more is fetched.

        Raises
        ------
        SharedError
            The far side fails, and is required. Otherwise that is a miss.

        Notes
        -----
        Waits no longer than the timeouts and the deadline of the options. What came before a failure is stored.
        """
        wants = [want for want in wants if want.start < num_tokens(want.packed) or not want.has_logits]
        items: list[Item] = []
        try:
            if not wants or not self._is_worth(wants, compute_tokens_per_s):
                return 0
            items = self.find(root, wants, compute_tokens_per_s)
            return self.fetch(items, stop=stop) if items else 0
        except SharedError as error:
            if self._calls.options.required:
                raise
            note("shared_not_fetched", f"computed, not fetched: {error}", num_prompts=len(wants))
            return len(items)  # what came before it failed may be here

    def _is_worth(self, wants: Sequence[Want], rate: float | None) -> bool:
        """Return whether asking may pay: a round trip can take longer than computing a few tokens."""
        trip_s = self._calls.round_trip_s
        if rate is None or trip_s is None:
            return True
        tokens = sum(max(1, num_tokens(want.packed) - want.start) for want in wants)
        return tokens / rate >= trip_s or self._retries()

    def _retries(self) -> bool:
        self._num_declined += 1
        if self._num_declined % _RETRY_EVERY == 0:
            return True
        self._calls.counts.skipped += 1
        return False

    # Finding

    def find(self, root: Root, wants: Sequence[Want], rate: float | None = None) -> list[Item]:
        """Return what there is to fetch of prompts: all of it, or, if the model's rate is known, what that is good for.

        Raises
        ------
        SharedError
            The far side fails.
        """
        calls, counts = self._calls, self._calls.counts
        chunk = self._db.chunk_tokens
        walks = [Walk(root, want.packed, want.start, want.boundaries, chunk) for want in wants]
        ends = [
            logits_key(root.digest, PrefixHasher(root.digest, want.packed).at(num_tokens(want.packed)))
            for want in wants
        ]
        began, batch = monotonic(), calls.far.first_batch
        known: dict[str, Entry] = {}
        asked = list(ends)
        for _ in range(_MOST_TRIPS):
            asked += [key for walk in walks for key in walk.ask(batch)]
            keys = list(dict.fromkeys(key for key in asked if key not in known))
            if not keys or monotonic() - began > calls.options.deadline_s:
                break
            known |= self.entries(keys, calls.lookup(keys))
            for walk in walks:
                walk.take(known)
            asked, batch = [], 2 * batch
        counts.lookups += len(wants)
        items: dict[str, Item] = {}
        for want, walk, end in zip(wants, walks, ends, strict=True):
            counts.hits += bool(walk.steps)
            before, position = "", want.start
            steps = self._affordable(walk, rate)
            if steps:
                self._touch(walk.ancestors)
            for step in steps:
                items.setdefault(step.key, Item(step.key, step.entry, before, step.end - position))
                before, position = step.key, step.end
            total = num_tokens(want.packed)
            has_logits = want.has_logits and want.start == total
            if (
                position == total
                and not has_logits
                and end in known
                and not (steps and total in steps[-1].entry.logits)
            ):
                entry = known[end]
                # Its value holds the last token again; what is taken of it are the logits.
                items.setdefault(end, Item(end, entry, before, 0))
        return list(items.values())

    def _touch(self, keys: Sequence[str]) -> None:
        """Let the far side know that what these spans stand on is in use: what goes by age would go before them."""
        now = monotonic()
        if not keys or now - self._touched.get(keys[-1], -_TOUCH_EVERY_S) < _TOUCH_EVERY_S:
            return
        if len(self._touched) >= _MOST_TOUCHED:
            self._touched.clear()
        self._touched[keys[-1]] = now

        def work(far: FarStore) -> None:
            found = self.entries(keys, far.get(keys))
            far.exists([value_key(entry.value) for entry in found.values()])

        self._calls.touch(work)

    def entries(self, keys: Sequence[str], found: Sequence[Pieces | None]) -> dict[str, Entry]:
        """Return the entries that were found and may be used, by key."""
        entries = {}
        for key, pieces in zip(keys, found, strict=True):
            if pieces is None:
                continue
            try:
                entry = Entry.unpack(key, joined(pieces))
            except CorruptDataError as error:
                self._reject(key, error.message, [key])
                continue
            if self.trust is not None and not self.trust.holds(entry.message(key), entry.public_key, entry.signature):
                # Left where it is: others may trust whoever wrote it.
                self._reject(key, "not signed by anybody trusted", [])
                continue
            entries[key] = entry
        return entries

    def _affordable(self, walk: Walk, rate: float | None) -> list[FarStep]:
        """Return the steps of a walk that are sooner fetched than computed."""
        steps, speed = list(walk.steps), self._calls.bytes_per_s
        if not steps or rate is None or speed is None:
            return steps
        starts = [walk.start, *(step.end for step in steps)]
        while steps and steps[-1].entry.size_bytes / speed > (steps[-1].end - starts[len(steps) - 1]) / rate:
            steps.pop()
        fetch_s = sum(step.entry.size_bytes for step in steps) / speed
        if steps and fetch_s <= (steps[-1].end - walk.start) / rate:
            return steps
        return list(walk.steps) if self._retries() else []

    # Fetching

    def fetch(
        self,
        items: Sequence[Item],
        progress: Callable[[Item], object] = lambda item: None,
        deadline_s: float | None = None,
        stop: threading.Event | None = None,
    ) -> int:
        """Fetch values, check them, and store their spans; return how many tokens, or logits, are new here.

        Raises
        ------
        SharedError
            The far side fails. What came before that is stored.
        """
        report = ImportReport()
        deposit = Deposit(self._db, report, is_shared=True)
        began, size_bytes = monotonic(), 0
        broken: set[str] = set()
        wanted = [(value_key(item.entry.value), item.entry.size_bytes) for item in items]
        values = self._calls.fetch(wanted, deadline_s)
        try:
            for item in items:
                if stop is not None and stop.is_set():
                    break
                pieces = next(values)
                if item.after not in broken and self._take(item.key, item.entry, pieces, deposit):
                    size_bytes += item.entry.size_bytes
                    progress(item)
                else:
                    broken.add(item.key)
        finally:
            values.close()
            self._at_home(deposit.flush)
            self._calls.fetched(size_bytes, monotonic() - began)
            self._calls.counts.tokens_fetched += report.tokens_stored
            self._calls.counts.bytes_fetched += size_bytes
        return report.tokens_stored + report.logits_stored

    def _at_home(self, work: Callable[[], object]) -> bool:
        """Do something with the local store; return whether it went well.

        What cannot be kept here is computed, and the engine then says what is wrong.
        """
        try:
            work()
        except (CorruptDataError, FormatVersionError):
            raise
        except PromptDBError as error:
            if not self._is_local_failure_known:
                warn("shared_not_stored", f"what came from the shared store could not be stored here: {error}")
            self._is_local_failure_known = True
            return False
        return True

    def _take(self, key: str, entry: Entry, pieces: Pieces | None, deposit: Deposit) -> bool:
        """Check a value and hand its span to the deposit; return whether it holds."""
        if pieces is None:
            self._calls.counts.lost += 1
            self._clear([key, value_key(entry.value)])
            return False
        hasher = blake3(max_threads=blake3.AUTO if entry.size_bytes >= _AUTO_THREADS_BYTES else 1)
        for piece in pieces:
            hasher.update(piece)
        if hasher.digest() != entry.value:
            self._reject(key, "a value that is not the one its entry names", [key, value_key(entry.value)])
            return False
        try:
            return self._at_home(lambda: unpack(pieces, entry.node, self._db, deposit))
        except CorruptDataError as error:
            self._reject(key, error.message, [key])
        except FormatVersionError as error:
            self._reject(key, error.message, [])  # others may be able to read it
        return False

    def _reject(self, key: str, reason: str, keys: Sequence[str]) -> None:
        counts = self._calls.counts
        counts.rejected += 1
        say = warn if counts.rejected == 1 else note
        message = f"rejected from the shared store, and computed instead: {key}: {reason}"
        say("shared_rejected", message, key=key, reason=reason)
        self._clear(keys)

    def _clear(self, keys: Sequence[str]) -> None:
        """Take out what does not hold, so that somebody can put it again."""
        if not keys or self._calls.options.readonly:
            return
        try:
            self._calls.write(lambda far: far.delete(keys))
        except SharedError as error:
            note("shared_not_cleared", f"what is broken in the shared store stays there: {error}", keys=list(keys))
