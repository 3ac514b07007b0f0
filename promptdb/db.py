"""PromptDB: the store of representations. Knows tokens, spans and bytes; neither models nor tensors."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from promptdb.commits import (
    Bytes,
    PutReport,
    PutRequest,
    SpanPayload,
    add_to_totals,
    check_packed,
    put_all,
    remove_span,
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
from promptdb.memory import MemoryIndex
from promptdb.opening import check_options, default_path, open_index, read_settings
from promptdb.registry import Registry
from promptdb.snapshot import Match, Snapshot, Verified
from promptdb.tables import Index, Writer
from promptdb.trie import descendants

if TYPE_CHECKING:
    from types import TracebackType

    from promptdb.verify import Problem

_PAGE_RECORDS = 256


class PromptDB:
    """A persistent database of prompt representations.

    Parameters
    ----------
    path : directory of the store; by default ``$PROMPTDB_PATH``, else the user's data directory. Created if missing.
    readonly : open without the right to write; a missing store is then an error.
    chunk_tokens : longest span that is stored, in tokens. Fixed when the store is created (256 unless given).
    verify_reads : when checksums of blobs are checked: ``"once"`` per blob and process, ``"always"``, or ``"never"``.
        Records are checked at every read.
    map_bytes : initial size of LMDB's memory map; it grows by itself.

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

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        readonly: bool = False,
        chunk_tokens: int | None = None,
        verify_reads: str = "once",
        map_bytes: int | None = None,
    ) -> None:
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise InputTypeError(f"path must be a str or a path, not {type(path).__name__}")
        if path is not None and not str(path):
            raise NotAStoreError("the path of the store is empty", "a store is a directory; name one")
        check_options(chunk_tokens, verify_reads, map_bytes)
        directory = Path(path) if path is not None else default_path()
        self._open(directory, open_index(directory, readonly, map_bytes), chunk_tokens, verify_reads)

    @classmethod
    def in_memory(cls, *, chunk_tokens: int | None = None, verify_reads: str = "once") -> PromptDB:
        """Return a store that lives in this process's memory and dies with it."""
        check_options(chunk_tokens, verify_reads, None)
        db = cls.__new__(cls)
        db._open(None, MemoryIndex(), chunk_tokens, verify_reads)
        return db

    def _open(self, path: Path | None, index: Index, chunk_tokens: int | None, verify_reads: str) -> None:
        self.path = path
        self._index = index
        self._verified = Verified(verify_reads)
        self.registry = Registry(index)
        try:
            settings = read_settings(index, path, chunk_tokens)
        except BaseException:
            index.close()
            raise
        self.chunk_tokens: int = settings["chunk_tokens"]
        self.created_unix_s: float = settings["created_unix_s"]

    @property
    def readonly(self) -> bool:
        """Whether this handle may only read."""
        return self._index.readonly

    def close(self) -> None:
        """Release the store. Closing twice is harmless; everything that was put is already durable."""
        self._index.close()

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
        """Hold one consistent view of the store; see :class:`promptdb.snapshot.Snapshot`. Never waits for writers."""
        with self._index.read() as reader:
            yield Snapshot(reader, self._verified)

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
            return Snapshot(reader, self._verified).match(root, packed)

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
        """Return totals of the store: nodes, tokens, bytes of blobs, and sizes of the file. Cheap."""
        with self._index.read() as reader:
            totals = dict.fromkeys(TOTALS, 0)
            for key, value in reader.scan(ROOTS):
                for name, amount in unpack_root(key, value)[1].items():
                    totals[name] += amount
            totals["num_roots"] = reader.count(ROOTS)
            totals["num_logits"] = reader.count(LOGITS)
        return {**totals, **self._index.stats()}

    def verify(self, *, fix: bool = False) -> list[Problem]:
        """Walk the whole store and return what does not hold; see :func:`promptdb.verify.verify`.

        With ``fix``, spans that do not hold are then removed, and the child index and totals made again: what was
        returned is gone, unless it is the store's settings. Others cannot write meanwhile.
        """
        from promptdb.verify import repair, verify

        with self._index.read() as reader:
            problems = verify(reader)
        if fix and problems:
            self._index.transact(lambda writer: repair(writer, read_blobs=True))
        return problems

    # Writing

    def put(
        self,
        root: Root,
        packed: bytes,
        start: int,
        encode: Callable[[int], Sequence[SpanPayload]],
        logits: Mapping[int, Bytes] | None = None,
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

        Returns
        -------
        PutReport
            Spans that were stored already are left as they are: nodes are immutable.

        Raises
        ------
        ReadOnlyStoreError, StoreFullError, StoreError
            Nothing of the put is visible.
        PromptError
            Tokens, spans or positions that do not fit each other.

        Notes
        -----
        One transaction. Thread safe; writers of all processes take turns.
        """
        return self.put_many([PutRequest(root, packed, start, encode, logits or {})])[0]

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
        ReadOnlyStoreError, StoreFullError, StoreError, PromptError
            As :meth:`put`; nothing of any request is visible.

        Notes
        -----
        One transaction, and so one wait for the disk, whatever the number of requests; other writers wait for all of
        it. All spans are in memory at once. Thread safe.
        """
        return put_all(self._index, requests)

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

        def work(writer: Writer) -> int:
            snapshot = Snapshot(writer, Verified("never"))
            try:
                doomed = self.subtree(snapshot, node)
            except CorruptDataError:  # its record, or one before it: only a walk finds all that belongs to it
                from promptdb.verify import repair

                repair(writer, read_blobs=False)
                if writer.get(NODES, node) is None:
                    return 1
                doomed = self.subtree(snapshot, node)
            if only:
                del doomed[1:]
            for each, tokens in doomed:
                remove_span(writer, each, tokens)
            return len(doomed)

        return self._index.transact(work)

    def remove_logits(self, root: Root, prefix_digest: bytes) -> bool:
        """Remove the next-token logits after a prefix; return whether they were stored."""

        def work(writer: Writer) -> bool:
            data = writer.get(LOGITS, prefix_digest)
            if data is None:
                return False
            size_bytes = len(data)
            writer.delete(LOGITS, prefix_digest)
            add_to_totals(writer, root, 0, 0, -size_bytes)
            return True

        return self._index.transact(work)
