"""Limits of a store: quota, time to live, pins, tags, collecting. A part of :class:`promptdb.PromptDB`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from promptdb.collect import GcReport, collect
from promptdb.commits import check_packed, check_ttl
from promptdb.errors import CorruptDataError, InputTypeError, NodeNotFoundError, PromptDBError, StoreError
from promptdb.events import note
from promptdb.eviction import evict, keep_quota
from promptdb.format import LIFE, NODES, NodeRecord
from promptdb.keys import Root, pack_tokens
from promptdb.labels import PIN, TAG, Label, check_name, read_labels
from promptdb.ledger import Ledger, with_ledger
from promptdb.life import (
    COMPRESSIONS,
    DEFAULT_COMPRESSION,
    NEVER,
    POLICIES,
    Life,
    Limits,
    is_alive,
    read_limits,
    read_ttls,
    read_usage,
    write_ttl,
)
from promptdb.packing import check_available
from promptdb.pins import add_label, remove_labels
from promptdb.rebuild import FIRST_VERSION_WITH_CODING, require_version
from promptdb.served import Served, Tally, read_served, write_served
from promptdb.verify import verify

if TYPE_CHECKING:
    from promptdb.access import AccessLog
    from promptdb.snapshot import Snapshot
    from promptdb.tables import Index, Reader


DEFAULT_PIN_S = 30 * 86400.0
"""A forgotten pin does not live for ever."""

_FLUSH_USES = 1024
_EVICT_NODES = 4096


def check_limits(quota_bytes: int | None, policy: str | None, compression: str | None = None) -> None:
    """Raise what is wrong with a quota, a policy or a compression."""
    if quota_bytes is not None and type(quota_bytes) is not int:
        raise InputTypeError(f"quota_bytes must be an int, not {type(quota_bytes).__name__}")
    if quota_bytes is not None and not 0 <= quota_bytes < 1 << 62:
        raise StoreError(f"quota_bytes is {quota_bytes}", "choose a number of bytes, or 0 for no quota")
    if policy is not None and policy not in POLICIES:
        raise StoreError(f"policy is {policy!r}", f"choose one of {', '.join(POLICIES)}")
    if compression is not None and compression not in COMPRESSIONS:
        raise StoreError(f"compression is {compression!r}", f"choose one of {', '.join(COMPRESSIONS)}")
    if compression not in (None, DEFAULT_COMPRESSION):
        check_available()


class CompactReport(NamedTuple):
    """Size of the file before and after it was compacted."""

    before_bytes: int
    after_bytes: int


class Lifecycle:
    """What may go of a store, and when. A base of :class:`promptdb.PromptDB`; see docs/lifecycle.md.

    Thread safe, as the index is. Every method that changes something raises
    :class:`~promptdb.errors.ReadOnlyStoreError` on a handle that is open for reading only.
    """

    _index: Index
    _clock: Callable[[], float]
    _accesses: AccessLog | None
    _tally: Tally

    if TYPE_CHECKING:

        def _snapshot(self, reader: Reader) -> Snapshot: ...

    # Limits

    def limits(self) -> Limits:
        """Return the quota in bytes (0: none), the policy of eviction, and how blobs are compressed."""
        with self._index.read() as reader:
            return read_limits(reader)

    def set_quota(self, quota_bytes: int | None, *, policy: str | None = None) -> None:
        """Set what the store may be charged in all, and what goes first when it is reached. For all processes, at once.

        Parameters
        ----------
        quota_bytes : 0: no quota; None: as it was. What is charged is defined in FORMAT.md: the bytes of records,
            blobs, logits and index entries, large ones in whole pages.
        policy : ``"cost"`` (the default): what saves the fewest seconds of computing per byte and was not used for
            long; ``"lru"``: what was not used for longest; ``"fifo"``: what was stored first; ``"ttl"``: nothing but
            what has expired, so that a put fails instead.

        Raises
        ------
        QuotaExceededError
            What is pinned is larger than the quota; nothing is changed but what was evicted on the way.
        StoreError, InputTypeError
            Numbers or names that cannot be.

        Notes
        -----
        Evicts what is over the quota, a thousand spans a transaction. A new policy ranks every span again, in one
        transaction: about 20 microseconds a span.
        """
        check_limits(quota_bytes, policy)
        self.flush_accesses()
        if quota_bytes:
            self._evict_to(quota_bytes, policy)

        def work(ledger: Ledger) -> None:
            old = ledger.limits
            quota = old.quota_bytes if quota_bytes is None else quota_bytes
            ledger.limits = replace(old, quota_bytes=quota, policy=policy or old.policy)
            ledger.limits.write(ledger.writer)
            if ledger.limits.policy != old.policy:
                for node in list(ledger.writer.keys(LIFE)):
                    ledger.rank_again(node)
            ledger.write()
            keep_quota(ledger)

        with_ledger(self._index, self._clock(), work)

    def _evict_to(self, goal_bytes: int, policy: str | None) -> None:
        """Evict in small transactions what a quota leaves no room for, unless another policy is to choose."""
        if policy is None or policy == self.limits().policy:
            while with_ledger(
                self._index,
                self._clock(),
                lambda ledger: evict(ledger, enough_bytes=goal_bytes, goal_bytes=goal_bytes, max_nodes=_EVICT_NODES),
            ):
                pass

    def set_compression(self, compression: str) -> None:
        """Set how blobs are stored from now on, by all processes. What is stored stays as it is.

        Parameters
        ----------
        compression : ``"zstd"``: byte planes apart, then zstd, where that makes a blob smaller by a page and a
            sixteenth at least; lossless. ``"off"``: as they are.

        Raises
        ------
        MissingLibraryError
            zstandard is not installed.

        Notes
        -----
        With ``"zstd"`` the store becomes one of format version 3, which older versions of promptdb refuse. See
        docs/lifecycle.md for what it costs.
        """
        check_limits(None, None, compression)

        def work(ledger: Ledger) -> None:
            if compression != DEFAULT_COMPRESSION:
                require_version(ledger.writer, FIRST_VERSION_WITH_CODING)
            ledger.limits = replace(ledger.limits, compression=compression)
            ledger.limits.write(ledger.writer)

        with_ledger(self._index, self._clock(), work)

    def set_ttl(self, ttl_s: float | None, *, namespace: str = "") -> None:
        """Set how long spans live that are stored in a namespace from now on, unless a put says otherwise.

        Parameters
        ----------
        ttl_s : seconds; None: for ever.
        namespace : the default one is empty.
        """
        check_ttl(ttl_s)
        Root("", "", namespace)  # checks the name
        ends = None if ttl_s is None or math.isinf(ttl_s) else float(ttl_s)
        with_ledger(self._index, self._clock(), lambda ledger: write_ttl(ledger.writer, namespace, ends))

    def ttls(self) -> dict[str, float]:
        """Return how long spans live, in seconds, by namespace; those that are not in it live for ever."""
        with self._index.read() as reader:
            return read_ttls(reader)

    # Pins and tags

    def pin(
        self,
        root: Root,
        token_ids: Iterable[int] | bytes,
        *,
        expires_s: float = DEFAULT_PIN_S,
        name: str = "",
    ) -> Label:
        """Protect what is stored of a prompt from eviction and expiry, from its start on.

        Parameters
        ----------
        token_ids : the prompt's token IDs, or its packed tokens.
        expires_s : for how long, in seconds from now. 30 days unless given; never for ever.
        name : to find the pin by.

        Returns
        -------
        Label
            ``num_tokens`` tells how much of the prompt is held: the spans that are stored now, the last one in full.
            What is stored of it later is not. A pin of the same name that ends at the same span is replaced.

        Raises
        ------
        NodeNotFoundError
            Nothing of the prompt is stored.
        """
        check_name(name, may_be_empty=True)
        return self._add(PIN, name, expires_s, lambda: self._end_of(root, token_ids))

    def pin_node(self, node: bytes, *, expires_s: float = DEFAULT_PIN_S, name: str = "") -> Label:
        """Protect a span and all that it stands on; otherwise as :meth:`pin`."""
        check_name(name, may_be_empty=True)
        return self._add(PIN, name, expires_s, lambda: node)

    def tag(self, name: str, root: Root, token_ids: Iterable[int] | bytes, *, expires_s: float | None = None) -> Label:
        """Give what is stored of a prompt a name, one of any number. A tag protects nothing.

        Parameters
        ----------
        expires_s : for how long; by default, as long as the prompt is stored.
        """
        check_name(name, may_be_empty=False)
        return self._add(TAG, name, expires_s, lambda: self._end_of(root, token_ids))

    def tag_node(self, name: str, node: bytes, *, expires_s: float | None = None) -> Label:
        """Give a span and all that it stands on a name; otherwise as :meth:`tag`."""
        check_name(name, may_be_empty=False)
        return self._add(TAG, name, expires_s, lambda: node)

    def _end_of(self, root: Root, token_ids: Iterable[int] | bytes) -> bytes:
        packed = token_ids if isinstance(token_ids, bytes) else pack_tokens(token_ids)
        check_packed(packed)
        with self._index.read() as reader:
            match = self._snapshot(reader).match(root, packed)
        if not match.steps:
            raise NodeNotFoundError("nothing of this prompt is stored", "put it first")
        return match.steps[-1].node

    def _add(self, kind: str, name: str, expires_s: float | None, end: Callable[[], bytes]) -> Label:
        if expires_s is not None:
            check_ttl(expires_s)
            if kind == PIN and math.isinf(expires_s):
                raise StoreError("a pin that never ends", "choose a number of seconds; it can be pinned again")
        elif kind == PIN:
            raise InputTypeError("a pin must end: expires_s is None", "choose a number of seconds")
        node = end()

        def work(ledger: Ledger) -> Label:
            data = ledger.writer.get(NODES, node)
            life = ledger.life(node)
            if data is None or life is None or life.ends_unix_s <= ledger.now:
                raise NodeNotFoundError(f"no node {node.hex()}", "it was removed, or has expired; put it again")
            ends = NEVER if expires_s is None else ledger.now + expires_s
            label = Label(kind, node, name, NodeRecord.unpack(node, data).end, ledger.now, ends)
            add_label(ledger, label)
            return label

        return with_ledger(self._index, self._clock(), work)

    def pins(self) -> list[Label]:
        """Return the pins that have not ended."""
        return self._labels(PIN)

    def tags(self, name: str | None = None) -> list[Label]:
        """Return the tags that have not ended and whose spans are stored; only those of a name, if it is given."""
        return [label for label in self._labels(TAG) if name is None or label.name == name]

    def _labels(self, kind: str) -> list[Label]:
        now = self._clock()
        with self._index.read() as reader:
            return [
                label
                for label in read_labels(reader, kind)
                if label.expires_unix_s > now and reader.get(NODES, label.node) is not None
            ]

    def tagged(self, name: str) -> set[bytes]:
        """Return the IDs of all spans of the prompts that have a tag, from their starts on."""
        with self._index.read() as reader:
            now = self._clock()
            found: set[bytes] = set()
            for label in read_labels(reader, TAG):
                if label.name != name or label.expires_unix_s <= now:
                    continue
                node = label.node
                while node and node not in found and (data := reader.get(LIFE, node)) is not None:
                    if is_alive(data, now):
                        found.add(node)
                    node = Life.unpack(node, data).parent
            return found

    def unpin(self, *, name: str | None = None, node: bytes | None = None) -> int:
        """Take pins off: those of a name, those that end at a span, or those of both. Return how many there were."""
        return self._remove_labels(PIN, name, node)

    def untag(self, name: str | None = None, *, node: bytes | None = None) -> int:
        """Remove tags, chosen as by :meth:`unpin`. Return how many there were."""
        return self._remove_labels(TAG, name, node)

    def _remove_labels(self, kind: str, name: str | None, node: bytes | None) -> int:
        if name is None and node is None:
            raise StoreError(f"no {kind} is named", "give a name or a node")

        def work(ledger: Ledger) -> int:
            labels = read_labels(ledger.writer, kind, node or b"")
            return remove_labels(ledger, [label for label in labels if name is None or label.name == name])

        return with_ledger(self._index, self._clock(), work)

    # Collecting

    def gc(self, target_bytes: int | None = None, *, dry_run: bool = False) -> GcReport:
        """Remove what has expired, spans that stand on nothing, and leftovers; then evict down to a target.

        Parameters
        ----------
        target_bytes : what the store may be charged then; None: evict nothing. What is pinned stays.
        dry_run : remove nothing, only count. Others cannot write meanwhile.

        Returns
        -------
        GcReport

        Notes
        -----
        A thousand spans a transaction. Reads the keys of all blobs and index entries: about 10 microseconds a node. The
        file does not shrink, its pages are used again: :meth:`compact` gives space back.
        """
        check_limits(target_bytes, None)
        self.flush_accesses()
        return collect(self._index, self._clock, target_bytes, dry_run=dry_run)

    def compact(self) -> CompactReport:
        """Give space that is not in use back to the disk: write the store anew beside the file, check it, and swap.

        Returns
        -------
        CompactReport
            Sizes of the file before and after.

        Raises
        ------
        StoreError
            Another process has the store open, this thread reads from it, or the directory cannot be written.
        StoreFullError
            There is no room for the copy beside the file.
        CorruptDataError
            The store is damaged: ``promptdb verify --fix`` first.

        Notes
        -----
        All is checked, blobs too: some seconds a gigabyte, and as much free disk as the store uses. Other threads of
        this process wait meanwhile, other processes that open the store wait for half a minute. However it ends, the
        store is the one before or the one after: the new file takes the old one's name in one step, when it is on the
        disk.
        """

        def check(reader: Reader) -> None:
            problems = verify(reader)
            if problems:
                first = f"{len(problems)} problems, the first: {problems[0].what}"
                raise CorruptDataError(f"the store is damaged: {first}", "`promptdb verify --fix`, then again")

        self.flush_accesses()
        before = self._index.stats()["file_bytes"]
        self._index.compact(check)
        return CompactReport(before, self._index.stats()["file_bytes"])

    def usage(self) -> dict[str, int]:
        """Return what the store is charged, its quota, what is pinned, and what has been evicted. Cheap.

        Without ``charged_bytes`` and what follows from it for a store that was not written since format version 1.
        """
        with self._index.read() as reader:
            limits, usage = read_limits(reader), read_usage(reader)
        found = {"quota_bytes": limits.quota_bytes}
        if usage is not None:
            for field in ("charged_bytes", "pinned_bytes", "num_orphans"):
                found[field] = getattr(usage, field)
            for field in ("num_evicted", "evicted_bytes", "num_expired", "expired_bytes"):
                found[field] = getattr(usage, field)
        return found

    # Access times

    def flush_accesses(self) -> None:
        """Write when spans were used last, as far as this handle knows; close does, too. Never fails: it is a hint."""
        accesses = self._accesses
        if accesses is None:
            return
        served = self._tally.take()
        while (used := accesses.take(_FLUSH_USES)) or served:

            def write(ledger: Ledger, used: dict[bytes, float] = used, served: dict[str, Served] = served) -> None:
                ledger.touch(used)
                write_served(ledger.writer, served)

            try:
                with_ledger(self._index, self._clock(), write)
            except PromptDBError as error:
                self._tally.put_back(served)
                note("uses_not_written", f"the times of last use were not written: {error}")
                return
            served = {}

    def served(self) -> dict[str, Served]:
        """Return what engines have served from the store, by weights ID: what is written, and what this handle has not
        written yet."""
        waiting = self._tally.take()
        self._tally.put_back(waiting)
        with self._index.read() as reader:
            found = read_served(reader)
        for weights_id, served in waiting.items():
            found.setdefault(weights_id, Served()).add(served)
        return found
