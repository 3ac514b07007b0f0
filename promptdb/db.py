"""PromptDB: the store of representations. Knows tokens, spans and bytes; neither models nor tensors."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from promptdb.errors import (
    CorruptDataError,
    FormatVersionError,
    InputTypeError,
    NodeNotFoundError,
    NotAStoreError,
    PromptError,
    StoreError,
)
from promptdb.format import (
    BLOBS,
    FORMAT_VERSION,
    LOGITS,
    META,
    NODES,
    ROOTS,
    STORE_KEY,
    TOTALS,
    BlobEntry,
    Layout,
    NodeRecord,
    checksum,
    pack_record,
    pack_root,
    unpack_record,
    unpack_root,
)
from promptdb.keys import TOKEN_BYTES, PrefixHasher, Root, node_id, num_tokens, pack_tokens
from promptdb.memory import MemoryIndex
from promptdb.registry import Registry
from promptdb.snapshot import VERIFY_MODES, Match, Snapshot, Verified, logits_owner, pack_logits
from promptdb.tables import Index, Reader, Writer
from promptdb.trie import attach, descendants, detach, match
from promptdb.version import __version__

if TYPE_CHECKING:
    from types import TracebackType

    from promptdb.verify import Problem

Bytes = bytes | bytearray | memoryview

DEFAULT_CHUNK_TOKENS = 256
MAX_CHUNK_TOKENS = 1 << 20
_PAGE_RECORDS = 256
PATH_VARIABLE = "PROMPTDB_PATH"


@dataclass(frozen=True)
class SpanPayload:
    """A computed span that is to be stored: prompt positions ``[start, end)`` and its blobs."""

    start: int
    end: int
    layout: Layout
    blobs: Mapping[str, Bytes]
    compute_s: float
    provenance: Mapping[str, str | int | float]


@dataclass(frozen=True)
class PutReport:
    """What a put did: spans and tokens that were new, and bytes written for them."""

    num_spans: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_dropped: int = 0  # spans whose prefix somebody removed meanwhile: they would never be found


class _OverlapError(Exception):
    """Somebody stored a part of the first span meanwhile: encode again from ``position``."""

    def __init__(self, position: int) -> None:
        self.position = position


def default_path() -> Path:
    """Return where the store is when nobody says otherwise: ``$PROMPTDB_PATH``, or the user's data directory."""
    if os.environ.get(PATH_VARIABLE):
        return Path(os.environ[PATH_VARIABLE])
    import platformdirs

    return Path(platformdirs.user_data_dir("promptdb")) / "default.promptdb"


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
        _check_options(chunk_tokens, verify_reads, map_bytes)
        directory = Path(path) if path is not None else default_path()
        self._open(directory, _open_index(directory, readonly, map_bytes), chunk_tokens, verify_reads)

    @classmethod
    def in_memory(cls, *, chunk_tokens: int | None = None, verify_reads: str = "once") -> PromptDB:
        """Return a store that lives in this process's memory and dies with it."""
        _check_options(chunk_tokens, verify_reads, None)
        db = cls.__new__(cls)
        db._open(None, MemoryIndex(), chunk_tokens, verify_reads)
        return db

    def _open(self, path: Path | None, index: Index, chunk_tokens: int | None, verify_reads: str) -> None:
        self.path = path
        self._index = index
        self._verified = Verified(verify_reads)
        self.registry = Registry(index)
        try:
            settings = _read_settings(index, path, chunk_tokens)
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
        _check_packed(packed)
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
        _check_packed(packed)
        spans = _check_spans(encode(start), start, packed)
        if any(not 1 <= position <= num_tokens(packed) for position in logits or ()):
            raise PromptError(f"logits after {sorted(logits or ())} tokens of a prompt of {num_tokens(packed)}")
        checksums: dict[tuple[int, str], bytes] = {}
        while True:
            try:
                return self._index.transact(
                    lambda writer: _put(writer, root, packed, spans, logits or {}, checksums)  # noqa: B023
                )
            except _OverlapError as overlap:
                # What ends before the overlap stays: it may be this put's own, with spans that stood on it before.
                kept = [span for span in spans if span.end <= overlap.position]
                spans = kept + _check_spans(encode(overlap.position), overlap.position, packed)
                checksums.clear()

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
                _remove(writer, each, tokens)
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
            _add_to_totals(writer, root, 0, 0, -size_bytes)
            return True

        return self._index.transact(work)


def _check_packed(packed: bytes) -> None:
    if len(packed) % TOKEN_BYTES:
        raise PromptError(
            f"{len(packed)} bytes are no packed tokens", f"a token has {TOKEN_BYTES} bytes: pack_tokens()"
        )


def _check_spans(spans: Sequence[SpanPayload], start: int, packed: bytes) -> list[SpanPayload]:
    position = start
    for span in spans:
        if span.start != position or span.end <= span.start:
            break
        position = span.end
    else:
        if 0 <= start <= position <= num_tokens(packed):
            return list(spans)
    bounds = [(span.start, span.end) for span in spans]
    raise PromptError(f"spans {bounds} do not tile positions from {start} of a prompt of {num_tokens(packed)} tokens")


def _check_options(chunk_tokens: int | None, verify_reads: str, map_bytes: int | None) -> None:
    for name, value in (("chunk_tokens", chunk_tokens), ("map_bytes", map_bytes)):
        if value is not None and type(value) is not int:
            raise InputTypeError(f"{name} must be an int, not {type(value).__name__}")
    if verify_reads not in VERIFY_MODES:
        raise StoreError(f"verify_reads is {verify_reads!r}", f"choose one of {', '.join(VERIFY_MODES)}")
    if chunk_tokens is not None and not 1 <= chunk_tokens <= MAX_CHUNK_TOKENS:
        raise StoreError(f"chunk_tokens is {chunk_tokens}", f"choose a number from 1 to {MAX_CHUNK_TOKENS}")
    if map_bytes is not None and not 1 <= map_bytes < 1 << 47:
        raise StoreError(f"map_bytes is {map_bytes}", "choose a number of bytes that can be mapped, or leave it out")


def _open_index(path: Path, readonly: bool, map_bytes: int | None) -> Index:
    # Imported here: a store in memory does not need lmdb.
    from promptdb.index import DATA_FILE, DEFAULT_MAP_BYTES, LOCK_FILE, LmdbIndex

    try:
        if path.exists() and not path.is_dir():
            raise NotAStoreError(f"{path} is a file", "a store is a directory; choose another path")
        # A lock file alone: somebody is creating the store at this moment, or was killed while doing so.
        occupied = path.is_dir() and any(entry.name != LOCK_FILE for entry in path.iterdir())
        if occupied and not (path / DATA_FILE).exists():
            raise NotAStoreError(f"{path} is a directory of something else", "choose an empty or new directory")
        if readonly and not occupied:
            raise NotAStoreError(
                f"there is no store at {path}", "`promptdb put` creates one; check --db and PROMPTDB_PATH"
            )
    except NotAStoreError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise StoreError(f"{path} cannot be read: {error}", "check the path and its permissions") from error
    return LmdbIndex(path, readonly=readonly, map_bytes=map_bytes or DEFAULT_MAP_BYTES)


def _read_settings(index: Index, path: Path | None, chunk_tokens: int | None) -> dict[str, Any]:
    with index.read() as reader:
        data = reader.get(META, STORE_KEY)
        found = None if data is None else unpack_record(STORE_KEY, data)
        is_empty = reader.count(NODES) == 0
    if found is None:
        if index.readonly or not is_empty:
            raise NotAStoreError(f"{path} is an LMDB file of something else", "choose another path")
        fields = {
            "format_version": FORMAT_VERSION,
            "chunk_tokens": chunk_tokens or DEFAULT_CHUNK_TOKENS,
            "created_unix_s": time.time(),
            "created_by": f"promptdb {__version__}",
        }

        def create(writer: Writer) -> dict[str, Any]:
            # Another process may have been first; then its settings hold.
            standing = writer.get(META, STORE_KEY)
            if standing is not None:
                return unpack_record(STORE_KEY, standing)
            writer.put(META, STORE_KEY, pack_record(STORE_KEY, fields))
            return fields

        found = index.transact(create)
    version, chunk = found.get("format_version"), found.get("chunk_tokens")
    if type(version) is not int or version < 1:
        raise CorruptDataError(f"{path} has format version {version!r}", "restore the store from a copy")
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{path} has format version {version}; this promptdb {__version__} reads up to {FORMAT_VERSION}",
            "upgrade promptdb",
        )
    if type(chunk) is not int or not 1 <= chunk <= MAX_CHUNK_TOKENS or type(found.get("created_unix_s")) is not float:
        raise CorruptDataError(f"{path} has settings that cannot be", "restore the store from a copy")
    if chunk_tokens is not None and chunk_tokens != chunk:
        raise StoreError(
            f"{path} was created with chunk_tokens={chunk}, not {chunk_tokens}",
            "leave chunk_tokens out, or create another store",
        )
    return found


def _add_to_totals(writer: Writer, root: Root, nodes: int, tokens: int, size_bytes: int) -> None:
    data = writer.get(ROOTS, root.digest)
    totals = dict.fromkeys(TOTALS, 0) if data is None else unpack_root(root.digest, data)[1]
    totals["num_nodes"] += nodes
    totals["num_tokens"] += tokens
    totals["blob_bytes"] += size_bytes
    if totals["num_nodes"]:
        writer.put(ROOTS, root.digest, pack_root(root, totals))
    else:
        writer.delete(ROOTS, root.digest)


def _put(
    writer: Writer,
    root: Root,
    packed: bytes,
    spans: Sequence[SpanPayload],
    logits: Mapping[int, Bytes],
    checksums: dict[tuple[int, str], bytes],
) -> PutReport:
    walk = match(writer, root.digest, packed)
    covered = walk.num_tokens
    owner = walk.steps[-1].node if walk.steps else b""
    written = tokens = size_bytes = 0
    hasher = PrefixHasher(root.digest, packed)
    for position, span in enumerate(spans):
        if span.end <= covered:
            continue
        if span.start < covered:
            raise _OverlapError(covered)
        if span.start > covered:
            return _finish(writer, root, PutReport(written, tokens, size_bytes, len(spans) - position))
        child_hash = hasher.at(span.start)
        ids = packed[span.start * TOKEN_BYTES : span.end * TOKEN_BYTES]
        node = node_id(child_hash, ids)
        entries = {}
        for kind, blob in span.blobs.items():
            key = node + kind.encode()
            # The transaction may run twice, when the map has to grow: the checksum is computed once.
            if (span.start, kind) not in checksums:
                checksums[span.start, kind] = checksum(key, blob)
            entries[kind] = BlobEntry(len(blob), checksums[span.start, kind])
            writer.put(BLOBS, key, blob)
        record = NodeRecord(
            root, owner, child_hash, span.start, ids, span.layout, entries, time.time(), span.compute_s, span.provenance
        )
        writer.put(NODES, node, record.pack(node))
        attach(writer, child_hash, ids, node)
        written, tokens, size_bytes = written + 1, tokens + record.num_tokens, size_bytes + record.size_bytes
        # Spans that stood on this position before it was removed can be reached again.
        walk = match(writer, root.digest, packed, span.end)
        covered = walk.num_tokens
        owner = walk.steps[-1].node if walk.steps else node
    for position, blob in sorted(logits.items()):
        if position <= covered:
            digest = PrefixHasher(root.digest, packed).at(position)
            if writer.get(LOGITS, digest) is None:
                holder = match(writer, root.digest, packed[: position * TOKEN_BYTES]).steps[-1].node
                value = pack_logits(digest, holder, blob)
                writer.put(LOGITS, digest, value)
                size_bytes += len(value)
    return _finish(writer, root, PutReport(written, tokens, size_bytes))


def _finish(writer: Writer, root: Root, report: PutReport) -> PutReport:
    if report.num_spans or report.num_bytes:
        _add_to_totals(writer, root, report.num_spans, report.num_tokens, report.num_bytes)
    return report


def _logits_of(reader: Reader, node: bytes, record: NodeRecord, prefix: bytes | None) -> list[tuple[bytes, int]]:
    """Return (prefix digest, bytes) of the logits that were stored for positions inside a node."""
    found = []
    if prefix is not None:
        hasher = PrefixHasher(record.root.digest, prefix)
        for position in range(record.start + 1, record.end + 1):
            data = reader.get(LOGITS, digest := hasher.at(position))
            if data is not None:
                found.append((digest, len(data)))
    else:  # the tokens before the node are gone, so its digests cannot be computed: look at all
        for digest, data in reader.scan(LOGITS):
            if logits_owner(data) == node:
                found.append((digest, len(data)))
    return found


def _remove(writer: Writer, node: bytes, prefix: bytes | None) -> None:
    record = Snapshot(writer, Verified("never")).record(node)
    if record is None:
        return
    size_bytes = record.size_bytes
    for kind in record.blobs:
        writer.delete(BLOBS, node + kind.encode())
    for digest, logits_bytes in _logits_of(writer, node, record, prefix):
        size_bytes += logits_bytes
        writer.delete(LOGITS, digest)
    detach(writer, record.child_hash, record.span, node)
    writer.delete(NODES, node)
    _add_to_totals(writer, record.root, -1, -record.num_tokens, -size_bytes)
