"""The shared tier of a store: what is missing here is fetched from other machines, and what is new here goes there."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from promptdb.errors import CorruptDataError, NodeNotFoundError, PromptDBError, SharedError
from promptdb.events import note, unexpected, warn
from promptdb.far import FarStore
from promptdb.far_calls import FarCalls
from promptdb.far_open import open_far
from promptdb.keys import Root
from promptdb.leases import Leases
from promptdb.outbox import SPAN, Waiting, take_out, waiting
from promptdb.parcel import Parcel, load_logits, load_parcel
from promptdb.pulling import Puller, Want
from promptdb.pushing import Pusher, PushReport
from promptdb.shared_counts import SharedTotals, read_shared_counts, write_shared_counts
from promptdb.shared_options import SharedOptions
from promptdb.signing import Signer, Trust

if TYPE_CHECKING:
    from promptdb.db import PromptDB

_LOCK_FILE = "outbox.lock"
_POLL_S = 0.25
_BATCH_ENTRIES = 64
_BATCH_BYTES = 32 << 20
# How long closing a store waits for what is queued; the rest is sent when it is opened again.
_CLOSE_WAIT_S = 5.0
_LOCAL_FAILURE_S = 60.0
_COUNTS_EVERY_S = 60.0

_connecting = threading.Lock()


def connect(db: PromptDB) -> Tier | None:
    """Return the shared tier of a store, one for all engines on a handle; None if it has none. Does not connect yet.

    Raises
    ------
    SharedError
        A client is not installed, or a key cannot be read.
    """
    if db.shared is None or db.readonly:
        return None
    with _connecting:
        if db.tier is None:
            db.tier = Tier(db, db.shared)
            db.at_close(db.tier.close)
        return db.tier


class Tier:
    """What a store shares, and with whom. Thread safe.

    Parameters
    ----------
    db : the local store.
    options : where the shared store is, and how it is used.
    far : the shared store itself; by default the one of the options' URL.

    Notes
    -----
    Nothing is connected until something is asked for. A thread sends what waits in the store's outbox, in one process
    at a time; closing gives it a few seconds, and what is left then waits for the next time.
    """

    def __init__(self, db: PromptDB, options: SharedOptions, far: FarStore | None = None) -> None:
        self.db = db
        self.options = options
        self.calls = FarCalls(far or open_far(options), options)
        trust = Trust(options.trust) if options.trust else None
        self.puller = Puller(db, self.calls, trust)
        self.leases = Leases(db, self.calls, self.puller)
        self.pusher = Pusher(self.calls, Signer(options.sign_with) if options.sign_with else None)
        self._counted = SharedTotals()  # what is written of what this process has counted
        self._counting = threading.Lock()
        self._count_at = monotonic() + _COUNTS_EVERY_S
        self._wake = threading.Condition()
        self._is_closing = False
        self._not_before = 0.0
        self._has_told_failure = False
        self._thread: threading.Thread | None = None
        if not options.readonly:
            self._thread = threading.Thread(target=_run, args=(weakref.ref(self),), name="promptdb-shared", daemon=True)
            self._thread.start()

    def pull(
        self,
        root: Root,
        wants: Sequence[Want],
        compute_tokens_per_s: float | None = None,
        stop: threading.Event | None = None,
    ) -> int:
        """Fetch what is missing of prompts; see :meth:`promptdb.pulling.Puller.pull`."""
        try:
            return self.puller.pull(root, wants, compute_tokens_per_s, stop)
        finally:
            self._write_counts_now_and_then()

    # The outbox

    def num_waiting(self, most: int = 1 << 20) -> int:
        """Return how many spans and logits wait to be sent, up to a number."""
        with self.db.read() as snapshot:
            return len(waiting(snapshot.reader, most))

    def flush(self, wait_s: float | None = None) -> bool:
        """Wait until nothing waits to be sent, no longer than a time; return whether that is so.

        Without a time it waits as long as sending goes on, and gives up when it fails.
        """
        ends = None if wait_s is None else monotonic() + wait_s
        while self.num_waiting(1):
            left_s = _POLL_S if ends is None else min(_POLL_S, ends - monotonic())
            if left_s <= 0 or self._thread is None or not self._thread.is_alive() or self.calls.pause_s():
                return False
            with self._wake:
                self._wake.notify_all()
                self._wake.wait(left_s)
        return True

    def raise_failure(self) -> None:
        """Raise :class:`SharedError` if sending fails at this moment. What was not sent waits."""
        if self.calls.failure:
            raise SharedError(
                f"nothing can be sent: {self.calls.failure}",
                "what waits is sent when the store is used again, or by `promptdb push`",
            )

    def _send_some(self) -> bool:
        """Send the oldest entries of the outbox, if no other process does; return whether there may be more."""
        with self.db.read() as snapshot:
            entries = waiting(snapshot.reader, _BATCH_ENTRIES)
        if not entries or self.calls.pause_s() or monotonic() < self._not_before:
            return False
        with _claim(self.db.path) as is_ours:
            if not is_ours:
                return False
            done: list[bytes] = []
            spans: list[Parcel] = []
            logits: list[Parcel] = []
            size_bytes = 0
            for entry in entries:
                parcel = self._load(entry)
                done.append(entry.key)
                if parcel is not None:
                    (spans if entry.kind == SPAN else logits).append(parcel)
                    size_bytes += parcel.record.size_bytes
                if size_bytes >= _BATCH_BYTES:
                    break
            if spans:
                self.pusher.push(spans)
            if logits:
                self.pusher.push(logits, logits_only=True)
            self.db._index.transact(lambda writer: take_out(writer, done))
            self._has_told_failure = False
        return True

    def _load(self, entry: Waiting) -> Parcel | None:
        """Return what an entry names, or None if it is gone or damaged: then there is nothing to send."""
        try:
            if entry.kind == SPAN:
                return load_parcel(self.db, entry.identity)
            return load_logits(self.db, entry.identity)
        except (NodeNotFoundError, CorruptDataError) as error:
            note("shared_nothing_to_send", f"not sent to the shared store: {error}", identity=entry.identity.hex())
            return None

    def _round(self) -> float:
        """Do what there is to do; return how long to wait before the next time."""
        try:
            self._write_counts_now_and_then()
            return 0.0 if self._send_some() else _POLL_S
        except SharedError as error:
            note("shared_not_sent", f"not sent yet: {error}")
            return _POLL_S
        except PromptDBError as error:
            if not self._has_told_failure:
                warn("shared_local_failure", f"nothing is sent to the shared store, as the local one fails: {error}")
            self._has_told_failure = True
        except Exception:  # noqa: BLE001 - told, and the thread goes on
            if self._is_closing:  # what it used was closed under it
                return 0.0
            if not self._has_told_failure:
                unexpected("shared_send_failed", "sending to the shared store failed; it is tried once a minute")
            self._has_told_failure = True
        self._not_before = monotonic() + _LOCAL_FAILURE_S
        return _POLL_S

    def _rest(self, seconds: float) -> None:
        with self._wake:
            self._wake.notify_all()
            if seconds and not self._is_closing:
                self._wake.wait(seconds)

    # What is known

    def status(self) -> dict[str, object]:
        """Return what this process knows of the shared store, without asking it."""
        return {
            "url": self.calls.far.name,
            **asdict(self.calls.counts),
            "waiting": self.num_waiting(),
            "round_trip_s": self.calls.round_trip_s,
            "bytes_per_s": self.calls.bytes_per_s,
            "failures": self.calls.num_failures,
            "last_failure": self.calls.failure,
        }

    def totals(self) -> SharedTotals:
        """Return what all processes have had of the shared store that have used this local one, this one included."""
        with self._counting, self.db.read() as snapshot:
            return read_shared_counts(snapshot.reader).add(self._uncounted())

    def _uncounted(self) -> SharedTotals:
        """Return what is not written yet. Holds the lock."""
        failures = self.calls.num_failures - self._counted.failures
        failure = self.calls.latest_failure if failures else ""
        counts = replace(self.calls.counts) - self._counted.counts
        return SharedTotals(counts, failures, failure, time.time() if failures else 0.0)

    def _write_counts_now_and_then(self) -> None:
        if monotonic() >= self._count_at:
            self._write_counts()

    def _write_counts(self) -> None:
        """Add what was counted to what is stored. Never fails: it is a hint."""
        with self._counting:
            self._count_at = monotonic() + _COUNTS_EVERY_S
            new = self._uncounted()
            if new == SharedTotals() or self.db.readonly:
                return
            try:
                self.db._index.transact(lambda writer: write_shared_counts(writer, new))
            except PromptDBError as error:
                note("shared_counts_not_written", f"what was had of the shared store was not counted: {error}")
                return
            self._counted = self._counted.add(new)

    def close(self) -> None:
        """Send what waits, for some seconds at most, and release connections."""
        if self._is_closing:
            return
        thread = self._thread
        self.leases.close()
        try:
            if thread is not None and thread is not threading.current_thread():
                self.flush(_CLOSE_WAIT_S)
        finally:
            self._write_counts()
            with self._wake:
                self._is_closing = True
                self._wake.notify_all()
            self.calls.close()
            if thread is not None and thread is not threading.current_thread():
                thread.join(self.options.timeout_s + _CLOSE_WAIT_S)


def _run(reference: weakref.ref[Tier]) -> None:
    # A weak reference, so that a store that was forgotten, not closed, does not live on in this thread.
    while True:
        tier = reference()
        if tier is None or tier._is_closing:
            return
        tier._rest(tier._round())
        del tier


@contextmanager
def _claim(directory: Path | None) -> Iterator[bool]:
    """Hold the outbox of a store, so that processes do not send the same; tell whether it is free."""
    if directory is None:
        yield True
        return
    try:
        import fcntl
    except ImportError:  # no such locks: two may send the same, which is harmless
        yield True
        return
    try:
        descriptor = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


__all__ = ["PushReport", "Tier", "Want", "connect"]
