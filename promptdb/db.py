"""PromptDB: the store of representations. Knows tokens, spans and bytes; neither models nor tensors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from promptdb.access import AccessLog
from promptdb.artifact_records import sizes
from promptdb.artifacts import Artifacts
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
from promptdb.keys import DIGEST_BYTES, TOKEN_BYTES, Root, known_root, pack_tokens
from promptdb.ledger import Ledger, with_ledger
from promptdb.lifecycle import Lifecycle, check_limits
from promptdb.memory import MemoryIndex
from promptdb.opening import Wanted, check_options, default_path, open_index, open_settings
from promptdb.pins import remove_spans
from promptdb.recall import Recall
from promptdb.registry import Registry
from promptdb.served import Served, Tally
from promptdb.shared_options import SharedOptions, resolve
from promptdb.snapshot import Match, Snapshot, Verified
from promptdb.tables import Index, Reader, Reading
from promptdb.trie import descendants
from promptdb.userkey import find_key

if TYPE_CHECKING:
    from types import TracebackType

    from promptdb.shared import Tier
    from promptdb.verify import Problem

_PAGE_RECORDS = 256
# Uses of other prompts that one put writes, each of some spans: a few pages, where the put itself is small.
_USES_PER_PUT = 16


class PromptDB(Recall, Lifecycle):
    """A persistent database of prompt representations.

    Parameters
    ----------
    path : directory of the store; by default ``$PROMPTDB_PATH``, else the user's data directory. Created if missing.
    readonly : open without the right to write; a missing store is then an error.
    chunk_tokens : longest span that is stored, in tokens. Fixed when the store is created (256 unless given).
    verify_reads : when checksums of blobs are checked: ``"once"`` per blob and process, ``"always"``, or ``"never"``.
        Records are checked at every read.
    map_bytes : initial size of LMDB's memory map; it grows by itself.
    durability : what a put that has returned survives. ``"power"``: the machine losing power, if its disk keeps what it
        says it has. ``"recent"``: the same, but the last puts may be lost; no damage. ``"process"``: this process being
        killed; if the machine fails, the store may be lost. The same for all objects of a process on one path.
    quota_bytes, policy : what the store may be charged in all, and what is evicted first; see :meth:`set_quota`. Set
        when the store is created (no quota, and ``"cost"``, unless given).
    compression : how blobs are stored from now on, losslessly: ``"zstd"`` (needs the extra ``compression``) where that
        saves enough, or ``"off"``. Set when the store is created (``"off"`` unless given); see :meth:`set_compression`.
    key : encrypts a new store, and opens one that is (needs the extra ``encryption``): 64 hexadecimal digits or 32
        bytes. By default ``$PROMPTDB_KEY``, or what the file ``$PROMPTDB_KEY_FILE`` holds; empty: none, whatever those
        say. See docs/security.md.
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
    StoreKeyError
        The store is encrypted and this is not its key, or it is not and there is a key.
    MissingLibraryError
        The library for an encrypted store, or for the compression that was asked for, is not installed.
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
        durability: str = "power",
        quota_bytes: int | None = None,
        policy: str | None = None,
        compression: str | None = None,
        key: str | bytes | None = None,
        ttl_s: float | None = None,
        clock: Callable[[], float] = time.time,
        shared: str | SharedOptions | None = None,
        shared_required: bool = False,
    ) -> None:
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise InputTypeError(f"path must be a str or a path, not {type(path).__name__}")
        if path is not None and not str(path):
            raise NotAStoreError("the path of the store is empty", "a store is a directory; name one")
        wanted = Wanted(chunk_tokens, quota_bytes, policy, compression)
        check_options(chunk_tokens, verify_reads, map_bytes)
        check_limits(quota_bytes, policy, compression)
        check_ttl(ttl_s)
        user_key = find_key(key)
        directory = Path(path) if path is not None else default_path()
        index = open_index(directory, readonly, map_bytes, durability)
        self._open(directory, index, verify_reads, ttl_s, clock, wanted, user_key)
        if not readonly:
            try:
                with self._index.read() as reader:
                    self.shared = resolve(shared, shared_required, reader)
            except BaseException:
                self._index.close()
                raise

    @classmethod
    def in_memory(
        cls,
        *,
        chunk_tokens: int | None = None,
        verify_reads: str = "once",
        quota_bytes: int | None = None,
        policy: str | None = None,
        compression: str | None = None,
        ttl_s: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> PromptDB:
        """Return a store that lives in this process's memory and dies with it."""
        check_options(chunk_tokens, verify_reads, None)
        check_limits(quota_bytes, policy, compression)
        check_ttl(ttl_s)
        db = cls.__new__(cls)
        wanted = Wanted(chunk_tokens, quota_bytes, policy, compression)
        db._open(None, MemoryIndex(), verify_reads, ttl_s, clock, wanted, None)
        return db

    def _open(
        self,
        path: Path | None,
        index: Index,
        verify_reads: str,
        ttl_s: float | None,
        clock: Callable[[], float],
        wanted: Wanted,
        user_key: bytes | None,
    ) -> None:
        self.path = path
        self.ttl_s = ttl_s
        self._closing: list[Callable[[], None]] = []
        try:
            index, settings = open_settings(index, path, wanted, clock, user_key)
        except BaseException:
            index.close()
            raise
        self._index = index
        self._user_key = user_key
        self._clock = clock
        self._accesses = None if index.readonly else AccessLog()
        self._tally = Tally()
        self._verified = Verified(verify_reads)
        self.registry = Registry(index)
        self.artifacts = Artifacts(index, clock)
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

    @property
    def is_encrypted(self) -> bool:
        """Whether what the store holds is encrypted."""
        return self._user_key is not None

    def rotate_key(self, new_key: str | bytes) -> None:
        """Let another key open the store, and the one before no longer. What is stored is not written again.

        Parameters
        ----------
        new_key : 64 hexadecimal digits or 32 bytes.

        Raises
        ------
        StoreKeyError
            The store is not encrypted, or that is no key.

        Notes
        -----
        One transaction. Handles that are open stay so, in all processes. Who has had both the old key and the file can
        still read what is written: see docs/security.md.
        """
        from promptdb.opening import rotate

        self._user_key = rotate(self._index, self.path, find_key(new_key), self._clock())

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
        kv_codec: str = "",
    ) -> Match:
        """Find the longest stored prefix of a prompt. Needs no model, never computes, never writes.

        Parameters
        ----------
        token_ids : the prompt's n token IDs, or its packed tokens.
        model, tokenizer : weights ID and tokenizer ID, hex.
        namespace, intervention, kv_codec : the rest of the root.

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
        root = known_root(model, tokenizer, namespace, intervention, kv_codec)
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

        Reads all IDs, then a page of records at a time, and holds no snapshot between them: a long walk does not keep
        old pages from being used again. What is put meanwhile is not seen, and what is removed may be or not. Memory:
        100 bytes a span.
        """
        with self._index.read() as reader:
            nodes = list(reader.keys(NODES))
        for first in range(0, len(nodes), _PAGE_RECORDS):
            with self._index.read() as reader:
                page = [
                    (node, NodeRecord.unpack(node, value))
                    for node in nodes[first : first + _PAGE_RECORDS]
                    if (value := reader.get(NODES, node)) is not None
                ]
            yield from page

    def find_node(self, hex_prefix: str) -> bytes:
        """Return the ID of the one node whose ID starts with ``hex_prefix``.

        Raises
        ------
        NodeNotFoundError
            None starts so, or several do.
        """
        prefix = hex_prefix.lower()
        try:
            start = bytes.fromhex(prefix + "0" * (len(prefix) % 2))[: len(prefix) // 2]
        except ValueError as error:
            raise NodeNotFoundError(f"{hex_prefix!r} is not a node ID", "`promptdb ls` lists them") from error
        found: list[bytes] = []
        with self._index.read() as reader:
            if len(start) == DIGEST_BYTES:  # the table need not be searched
                nodes = iter([start] if reader.size(NODES, start) is not None else [])
            else:
                nodes = reader.keys(NODES, start)
            for node in nodes:
                if node.hex().startswith(prefix):
                    found.append(node)
                if len(found) > 1:
                    break
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
        """Return totals of the store: nodes, tokens, bytes, artifacts, limits, evictions, sizes of the file. Cheap."""
        usage = self.usage()
        with self._index.read() as reader:
            totals = dict.fromkeys(TOTALS, 0)
            for key, value in reader.scan(ROOTS):
                for name, amount in unpack_root(key, value)[1].items():
                    totals[name] += amount
            totals["num_roots"] = reader.count(ROOTS)
            totals["num_logits"] = reader.count(LOGITS)
            totals["num_artifacts"], totals["artifact_bytes"] = sizes(reader)
        return {**totals, **usage, **self._index.stats()}

    def readings(self) -> tuple[int, list[Reading]]:
        """Return the number of the last transaction, and who may hold snapshots of the store, in all processes."""
        return self._index.readings()

    def count_served(self, weights_id: str, served: Served) -> None:
        """Count what a model's engine has served; see :meth:`served`. Written with the next put, by close, or once a
        minute; a read-only handle forgets it. Thread safe, a microsecond."""
        if not self.readonly and self._tally.add(weights_id, served, self._clock()):
            self.flush_accesses()

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
        served = self._tally.take()
        try:
            return put_all(self._index, requests, clock=self._clock, used=used, served=served, to_share=self._shares)
        except BaseException:
            if self._accesses is not None:
                self._accesses.put_back(used)
            self._tally.put_back(served)
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
