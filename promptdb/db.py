"""PromptDB: the store of representations. Knows tokens, spans and bytes; neither models nor tensors."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from promptdb.access import AccessLog
from promptdb.commits import (
    Bytes,
    PutReport,
    PutRequest,
    SpanPayload,
    check_packed,
    check_ttl,
    put_all,
)
from promptdb.errors import (
    CorruptDataError,
    InputTypeError,
    NodeNotFoundError,
    NotAStoreError,
)
from promptdb.format import (
    LOGITS,
    NODES,
    ROOTS,
    TOTALS,
    NodeRecord,
    unpack_root,
)
from promptdb.keys import TOKEN_BYTES, Root, pack_tokens
from promptdb.ledger import Ledger, with_ledger
from promptdb.lifecycle import Lifecycle, check_limits
from promptdb.memory import MemoryIndex
from promptdb.opening import check_options, default_path, open_index, read_settings
from promptdb.pins import remove_spans
from promptdb.registry import Registry
from promptdb.shared_options import SharedOptions, resolve
from promptdb.snapshot import Match, Snapshot, Verified
from promptdb.tables import Index, Reader
from promptdb.trie import descendants

if TYPE_CHECKING:
    from types import TracebackType

    from promptdb.shared import Tier
    from promptdb.verify import Problem

_PAGE_RECORDS = 256
# Uses of other prompts that one put writes, each of some spans: a few pages, where the put itself is small.
_USES_PER_PUT = 16


class PromptDB(Lifecycle):
    """A persistent database of prompt representations.

    Parameters
    ----------
    path : directory of the store; by default ``$PROMPTDB_PATH``, else the user's data directory. Created if missing.
    readonly : open without the right to write; a missing store is then an error.
    chunk_tokens : longest span that is stored, in tokens. Fixed when the store is created (256 unless given).
    verify_reads : when checksums of blobs are checked: ``"once"`` per blob and process, ``"always"``, or ``"never"``.
        Records are checked at every read.
    map_bytes : initial size of LMDB's memory map; it grows by itself.
    quota_bytes, policy : what the store may be charged in all, and what is evicted first; see :meth:`set_quota`. Set
        when the store is created (no quota, and ``"cost"``, unless given).
    ttl_s : how many seconds prompts live that are put with this handle; by default, as their namespace's setting says.
    clock : seconds since 1970, for tests.
    shared : URL of a store that is shared with other machines, or its :class:`~promptdb.shared_options.SharedOptions`;
        by default ``$PROMPTDB_SHARED``, else the store's own setting; ``"none"`` for none. Engines fetch from there
        what is missing here, and what is put here goes there. Not for stores that are open for reading only.
    shared_required : a failure of the shared store is an error; otherwise it is a miss, and everything goes on.

    Raises
    ------
    NotAStoreError
        ``path`` holds something else.
    FormatVersionError
        The store was written by a newer version.
    ReadOnlyStoreError, StoreFullError, RemoteFilesystemError, StoreError
        The directory cannot be used, with the system's reason.

    Notes
    -----
    Thread safe, and safe to open from many processes at once. Any number of objects on one path share one LMDB
    environment. Not usable in a forked child: open it there. A context manager; leaving it closes.

    Examples
    --------
    >>> with PromptDB.in_memory() as db:
    ...     db.lookup([1, 2, 3], model="00" * 32, tokenizer="11" * 32).num_tokens
    0
    """

    shared: SharedOptions | None = None
    tier: Tier | None = None  # made by promptdb.shared.connect when it is used first

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        readonly: bool = False,
        chunk_tokens: int | None = None,
        verify_reads: str = "once",
        map_bytes: int | None = None,
        quota_bytes: int | None = None,
        policy: str | None = None,
        ttl_s: float | None = None,
        clock: Callable[[], float] = time.time,
        shared: str | SharedOptions | None = None,
        shared_required: bool = False,
    ) -> None:
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise InputTypeError(f"path must be a str or a path, not {type(path).__name__}")
        if path is not None and not str(path):
            raise NotAStoreError("the path of the store is empty", "a store is a directory; name one")
        check_options(chunk_tokens, verify_reads, map_bytes)
        check_limits(quota_bytes, policy)
        check_ttl(ttl_s)
        directory = Path(path) if path is not None else default_path()
        index = open_index(directory, readonly, map_bytes)
        self._open(directory, index, verify_reads, ttl_s, clock, (chunk_tokens, clock, quota_bytes, policy))
        if not readonly:
            try:
                with index.read() as reader:
                    self.shared = resolve(shared, shared_required, reader)
            except BaseException:
                index.close()
                raise

    @classmethod
    def in_memory(
        cls,
        *,
        chunk_tokens: int | None = None,
        verify_reads: str = "once",
        quota_bytes: int | None = None,
        policy: str | None = None,
        ttl_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> PromptDB:
        """Return a store that lives in this process's memory and dies with it."""
        check_options(chunk_tokens, verify_reads, None)
        check_limits(quota_bytes, policy)
        check_ttl(ttl_s)
        db = cls.__new__(cls)
        db._open(None, MemoryIndex(), verify_reads, ttl_s, clock, (chunk_tokens, clock, quota_bytes, policy))
        return db

    def _open(
        self,
        path: Path | None,
        index: Index,
        verify_reads: str,
        ttl_s: float | None,
        clock: Callable[[], float],
        wanted: tuple[int | None, Callable[[], float], int | None, str | None],
    ) -> None:
        self.path = path
        self.ttl_s = ttl_s
        self._closing: list[Callable[[], None]] = []
        self._index = index
        self._clock = clock
        self._accesses = None if index.readonly else AccessLog()
        self._verified = Verified(verify_reads)
        self.registry = Registry(index)
        try:
            settings = read_settings(index, path, *wanted)
        except BaseException:
            index.close()
            raise
        self.chunk_tokens: int = settings["chunk_tokens"]
        self.created_unix_s: float = settings["created_unix_s"]
        self.format_version: int = settings["format_version"]  # when it was opened

    @property
    def _shares(self) -> bool:
        """Whether what is put here goes to the shared store."""
        return self.shared is not None and not self.shared.readonly

    @property
    def readonly(self) -> bool:
        """Whether this handle may only read."""
        return self._index.readonly

    def close(self) -> None:
        """Release the store. Closing twice is harmless; everything that was put is already durable.

        Writes when spans were used last, so it may wait for another writer.
        """
        try:
            while self._closing:
                self._closing.pop()()
        finally:
            self.flush_accesses()
            self._index.close()

    def at_close(self, work: Callable[[], None]) -> None:
        """Have something done before the store is closed."""
        self._closing.append(work)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"PromptDB({str(self.path) if self.path else 'in memory'!r})"

    # Reading

    @contextmanager
    def read(self) -> Iterator[Snapshot]:
        """Hold one consistent view of the store; see :class:`promptdb.snapshot.Snapshot`. Never waits for writers.

        Once in many thousand times, the times of last use that have piled up are written afterwards.
        """
        with self._index.read() as reader:
            yield self._snapshot(reader)
        if self._accesses is not None and self._accesses.has_many:
            self.flush_accesses()

    def _snapshot(self, reader: Reader) -> Snapshot:
        return Snapshot(reader, self._verified, self._accesses, self._clock)

    def lookup(
        self,
        token_ids: Iterable[int] | bytes,
        *,
        model: str,
        tokenizer: str,
        namespace: str = "",
        intervention: str = "",
    ) -> Match:
        """Find the longest stored prefix of a prompt. Needs no model, never computes, never writes.

        Parameters
        ----------
        token_ids : the prompt's n token IDs, or its packed tokens.
        model, tokenizer : weights ID and tokenizer ID, hex.
        namespace, intervention : the rest of the root.

        Returns
        -------
        Match
            ``num_tokens`` in [0, n], to the token; ``steps`` say which spans cover them.

        Raises
        ------
        TokenRangeError, InputTypeError
            Token IDs that are no uint32 numbers.
        CorruptDataError
            The child index is damaged.

        Notes
        -----
        One read transaction, one digest and one index read per span. Thread safe.
        """
        packed = token_ids if isinstance(token_ids, bytes) else pack_tokens(token_ids)
        check_packed(packed)
        root = Root(model, tokenizer, namespace, intervention)
        with self._index.read() as reader:
            match = self._snapshot(reader).match(root, packed)
        if self._accesses is not None and self._accesses.has_many:
            self.flush_accesses()
        return match

    def roots(self) -> list[tuple[Root, dict[str, int]]]:
        """Return every root that has spans, with its totals: ``num_nodes``, ``num_tokens``, ``blob_bytes``."""
        with self._index.read() as reader:
            return [unpack_root(key, value) for key, value in reader.scan(ROOTS)]

    def nodes(self) -> Iterator[tuple[bytes, NodeRecord]]:
        """Yield (node ID, record) of every stored span, in the order of their IDs.

        Reads a page of records at a time, and holds no snapshot between them: a long walk does not keep old pages from
        being used again, and what is put or removed meanwhile may be seen or not.
        """
        start = b""
        while True:
            with self._index.read() as reader:
                page = [
                    (node, NodeRecord.unpack(node, value))
                    for node, value in itertools.islice(reader.scan(NODES, start), _PAGE_RECORDS)
                ]
            yield from page
            if len(page) < _PAGE_RECORDS:
                return
            start = page[-1][0] + b"\0"

    def find_node(self, hex_prefix: str) -> bytes:
        """Return the ID of the one node whose ID starts with ``hex_prefix``.

        Raises
        ------
        NodeNotFoundError
            None starts so, or several do.
        """
        prefix = hex_prefix.lower()
        try:
            start = bytes.fromhex(prefix + "0" * (len(prefix) % 2))
        except ValueError as error:
            raise NodeNotFoundError(f"{hex_prefix!r} is not a node ID", "`promptdb ls` lists them") from error
        found: list[bytes] = []
        with self._index.read() as reader:
            for node, _ in reader.scan(NODES, start):
                if not node.hex().startswith(prefix) or len(found) > 1:
                    break
                found.append(node)
        if len(found) != 1:
            reason = "several node IDs start" if found else "no node ID starts"
            raise NodeNotFoundError(f"{reason} with {hex_prefix!r}", "`promptdb ls` lists them")
        return found[0]

    def prefix(self, snapshot: Snapshot, record: NodeRecord) -> bytes | None:
        """Return the packed tokens from position 0 to the end of a span, or None if a span before it is gone."""
        pieces = [record.span]
        start = record.start
        while start:
            parent = snapshot.record(record.parent) if record.parent else None
            if parent is None or not parent.start < start <= parent.end:
                return None
            pieces.append(parent.span[: (start - parent.start) * TOKEN_BYTES])
            record, start = parent, parent.start
        return b"".join(reversed(pieces))

    def subtree(self, snapshot: Snapshot, node: bytes) -> list[tuple[bytes, bytes | None]]:
        """Return a span and everything that stands on it, the span first, each with its packed tokens from position 0.

        The tokens are None if a span before this one is gone; what stands on it is then unknown.

        Raises
        ------
        NodeNotFoundError
            There is no such node.
        """
        record = snapshot.record(node)
        if record is None:
            raise NodeNotFoundError(f"no node {node.hex()}", "`promptdb ls` lists them")
        prefix = self.prefix(snapshot, record)
        if prefix is None:
            # The span that it was put on is gone, but others may have taken that one's place: look at all.
            reachable = descendants(snapshot.reader, record.root.digest, b"", -1)
            prefix = next((tokens for _, each, tokens in reachable if each == node), None)
        if prefix is None:
            return [(node, None)]
        following = descendants(snapshot.reader, record.root.digest, prefix, record.start)
        return [(node, prefix), *((child, tokens) for _, child, tokens in following)]

    def stat(self) -> dict[str, int]:
        """Return totals of the store: nodes, tokens, bytes of blobs, limits, evictions, sizes of the file. Cheap."""
        usage = self.usage()
        with self._index.read() as reader:
            totals = dict.fromkeys(TOTALS, 0)
            for key, value in reader.scan(ROOTS):
                for name, amount in unpack_root(key, value)[1].items():
                    totals[name] += amount
            totals["num_roots"] = reader.count(ROOTS)
            totals["num_logits"] = reader.count(LOGITS)
        return {**totals, **usage, **self._index.stats()}

    def verify(self, *, fix: bool = False) -> list[Problem]:
        """Walk the whole store and return what does not hold; see :func:`promptdb.verify.verify`.

        With ``fix``, spans that do not hold are then removed, and the child index and totals made again: what was
        returned is gone, unless it is the store's settings. Others cannot write meanwhile.
        """
        from promptdb.verify import repair, verify

        with self._index.read() as reader:
            problems = verify(reader)
        if fix and problems:
            self._index.transact(lambda writer: repair(writer, read_blobs=True), frees=True)
        return problems

    # Writing

    def put(
        self,
        root: Root,
        packed: bytes,
        start: int,
        encode: Callable[[int], Sequence[SpanPayload]],
        logits: Mapping[int, Bytes] | None = None,
        *,
        ttl_s: float | None = None,
    ) -> PutReport:
        """Store spans of a prompt, all together or not at all, durably.

        Parameters
        ----------
        root : identity that the spans were computed with.
        packed : the prompt's n packed tokens.
        start : position that the first new span starts at; ``[0, start)`` should be stored already.
        encode : returns the spans that tile ``[position, n)``; called with ``start``, and again with a later position
            if somebody stored a part of the first span meanwhile.
        logits : by position i, a blob with next-token logits after ``[0, i)``.
        ttl_s : how long the prompt lives at least, in seconds from now; infinite: for ever. By default, as the handle
            or the namespace says. What is stored of it already then lives as long too.

        Returns
        -------
        PutReport
            Spans that were stored already are left as they are: nodes are immutable.

        Raises
        ------
        QuotaExceededError
            It does not fit into the store's quota, whatever else is evicted. Nothing was evicted, nothing stored.
        ReadOnlyStoreError, StoreFullError, StoreError
            Nothing of the put is visible. On a full disk, something was evicted, and that was not enough.
        PromptError
            Tokens, spans or positions that do not fit each other.

        Notes
        -----
        One transaction, that of the eviction included. Thread safe; writers of all processes take turns.
        """
        return self.put_many([PutRequest(root, packed, start, encode, logits or {}, ttl_s)])[0]

    def put_many(self, requests: Sequence[PutRequest]) -> list[PutReport]:
        """Store spans of many prompts in order, all together or not at all, durably.

        Parameters
        ----------
        requests : as the arguments of :meth:`put`. One may stand on spans that one before it stores.

        Returns
        -------
        list of PutReport
            One for each request.

        Raises
        ------
        QuotaExceededError, ReadOnlyStoreError, StoreFullError, StoreError, PromptError
            As :meth:`put`; nothing of any request is visible.

        Notes
        -----
        One transaction, and so one wait for the disk, whatever the number of requests; other writers wait for all of
        it. All spans are in memory at once. Thread safe.
        """
        if self.ttl_s is not None:
            requests = [replace(each, ttl_s=self.ttl_s) if each.ttl_s is None else each for each in requests]
        used = self._accesses.take(_USES_PER_PUT) if self._accesses is not None else {}
        try:
            return put_all(self._index, requests, clock=self._clock, used=used, to_share=self._shares)
        except BaseException:
            if self._accesses is not None:
                self._accesses.put_back(used)
            raise

    def remove(self, node: bytes, *, only: bool = False) -> int:
        """Remove a stored span and everything that stands on it; return how many spans went.

        Parameters
        ----------
        node : node ID, 32 bytes.
        only : leave what stands on it, unreachable until the span is stored again.

        Raises
        ------
        NodeNotFoundError
            There is no such node.
        """

        def work(ledger: Ledger) -> int:
            doomed = self._doomed(ledger, node, only=only)
            return remove_spans(ledger, doomed, labels_too=not only) if doomed else 1

        return with_ledger(self._index, self._clock(), work)

    def _doomed(self, ledger: Ledger, node: bytes, *, only: bool) -> list[bytes]:
        """Return what goes with a span; nothing if the span was damaged, so that a repair has taken it out."""
        writer = ledger.writer
        snapshot = Snapshot(writer, Verified("never"))
        try:
            found = self.subtree(snapshot, node)
        except CorruptDataError:  # its record, or one before it: only a walk finds all that belongs to it
            from promptdb.verify import repair

            repair(writer, read_blobs=False)
            ledger.reload()
            if writer.get(NODES, node) is None:
                return []
            found = self.subtree(snapshot, node)
        return [each for each, _ in (found[:1] if only else found)]

    def remove_logits(self, root: Root, prefix_digest: bytes) -> bool:
        """Remove the next-token logits after a prefix; return whether they were stored."""
        return with_ledger(self._index, self._clock(), lambda ledger: ledger.remove_logits(root, prefix_digest))
