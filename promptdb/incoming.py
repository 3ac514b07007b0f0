"""Reading an archive: every frame is checked against those before it, and what holds is put into a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from promptdb.db import PromptDB
from promptdb.deposit import Deposit, ImportReport
from promptdb.errors import CorruptDataError, StoreError
from promptdb.format import CHECKSUM_BYTES, Layout, NodeRecord, checksum, unpack_record, unpack_root
from promptdb.frames import (
    BLOB,
    DONE,
    DONE_KEY,
    LOGITS_AFTER,
    MANIFEST,
    MANIFEST_KEY,
    MODEL,
    NODE,
    PATH,
    RECORDED,
    ROOT,
    TOKENIZER,
    VERSION_WITHOUT_ACTIVATIONS,
    FrameReader,
)
from promptdb.intake import MAX_LOGITS_BYTES, MAX_PROMPT_TOKENS, check_activations, check_record, check_root
from promptdb.keys import DIGEST_BYTES, TOKEN_BYTES, PrefixHasher, Root, node_id, num_tokens
from promptdb.tables import MAX_KEY_BYTES

DEFAULT_MAX_BLOB_BYTES = 1 << 30
POSITION_BYTES = 8
NAME_BYTES = 2  # of the length of a name
_MAX_ENTRIES = 10_000  # of models and tokenizers

# The longest body of each kind of frame; that of a blob stands in its span's record.
LIMITS = {
    MANIFEST: 1 << 20,
    MODEL: 1 << 16,
    TOKENIZER: 64 << 20,
    ROOT: 1 << 16,
    PATH: MAX_PROMPT_TOKENS * TOKEN_BYTES,
    NODE: 8 << 20,
    LOGITS_AFTER: MAX_LOGITS_BYTES,
    DONE: 1 << 16,
}


def _these(*kinds: bytes) -> dict[bytes, int]:
    return {kind: LIMITS[kind] for kind in kinds}


# What may come after a frame of each kind. The blobs of a span are read with its record.
_FOLLOWING = {
    MANIFEST: _these(MODEL, TOKENIZER, ROOT, DONE),
    MODEL: _these(MODEL, TOKENIZER, ROOT, DONE),
    TOKENIZER: _these(MODEL, TOKENIZER, ROOT, DONE),
    ROOT: _these(PATH, NODE, ROOT, DONE),
    PATH: _these(NODE, ROOT, DONE),
    NODE: _these(LOGITS_AFTER, NODE, ROOT, DONE),
    RECORDED: _these(LOGITS_AFTER, NODE, ROOT, DONE),
    LOGITS_AFTER: _these(LOGITS_AFTER, NODE, ROOT, DONE),
}


def _everything(identity: object) -> bool:
    return True


@dataclass(frozen=True)
class ImportOptions:
    """What of an archive is wanted; see :func:`promptdb.archive.import_archive`."""

    wants_model: Callable[[str], bool] = _everything
    wants_tokenizer: Callable[[str], bool] = _everything
    namespace: str | None = None
    max_blob_bytes: int = DEFAULT_MAX_BLOB_BYTES
    # Called with each span's node ID before its blobs are read; raises CorruptDataError for one that was not asked for.
    # A node ID stands for identity, all tokens before the span, and its own.
    check_node: Callable[[bytes], object] = _everything
    with_activations: bool = True


class Incoming:
    """Reads one archive into a store, or only checks it. Not thread safe.

    Parameters
    ----------
    db : where spans go; None checks the archive alone.
    progress : called with the bytes read so far.
    deposit : collects the spans of several archives, and is flushed by its owner; by default one for this archive.
    """

    def __init__(
        self,
        db: PromptDB | None,
        frames: FrameReader,
        options: ImportOptions,
        progress: Callable[[int], object],
        deposit: Deposit | None = None,
    ) -> None:
        self.report = ImportReport()
        self._frames = frames
        self._options = options
        self._progress = progress
        self._is_own_deposit = deposit is None
        self._deposit = deposit or Deposit(db, self.report)
        self._root: Root | None = None
        self._target: Root | None = None  # where spans of the root go; None: they are not wanted
        self._source_namespace: str | None = None
        self._path = b""  # packed tokens to the end of the last span
        self._last: NodeRecord | None = None
        self._layout: Layout | None = None  # of all spans of the root
        self._position = 0  # of the last logits
        self._series = b""  # of the last recorded activations of the span
        self._num_roots = self._num_entries = self._blob_bytes = 0

    def run(self) -> None:
        """Read everything.

        Raises
        ------
        CorruptDataError
            Something in the archive cannot be. What came before it, and nothing else, is stored.
        PromptDBError
            The store cannot be written.
        """
        try:
            self._read()
        except CorruptDataError:
            self._flush()
            raise
        finally:
            self.report.num_bytes = self._frames.num_bytes
        self._flush()
        self.report.is_complete = True

    def _flush(self) -> None:
        if self._is_own_deposit:
            self._deposit.flush()

    def _read(self) -> None:
        kind, body, digest = self._frames.read(_these(MANIFEST))
        self._take_manifest(body)
        takers = {
            ROOT: self._take_root,
            PATH: self._take_path,
            NODE: self._take_span,
            RECORDED: self._take_activations,
            LOGITS_AFTER: self._take_logits,
        }
        while True:
            kind, body, digest = self._frames.read(self._following(kind))
            self._progress(self._frames.num_bytes)
            if kind == DONE:
                self._check_totals(body, digest)
                return
            if kind in takers:
                takers[kind](body)
            else:
                self._take_entry(kind, body)

    def _following(self, kind: bytes) -> dict[bytes, int]:
        limits = _FOLLOWING[kind]
        if kind not in (NODE, RECORDED) or self._frames.version == VERSION_WITHOUT_ACTIVATIONS:
            return limits
        return {RECORDED: NAME_BYTES + MAX_KEY_BYTES + self._options.max_blob_bytes, **limits}

    def _take_manifest(self, body: bytearray) -> None:
        fields = unpack_record(MANIFEST_KEY, memoryview(body))
        namespaces = fields.get("num_namespaces")
        if type(namespaces) is not int or namespaces < 0:
            raise CorruptDataError("the manifest lacks the number of namespaces")
        if self._options.namespace is not None and namespaces > 1:
            _refuse_to_merge()

    def _take_entry(self, kind: bytes, body: bytearray) -> None:
        key, record = _split(body)
        self._num_entries += 1
        if self._num_entries > _MAX_ENTRIES:
            raise CorruptDataError(f"more than {_MAX_ENTRIES:,} models and tokenizers")
        fields = unpack_record(key, record)
        if kind == MODEL and self._options.wants_model(key.hex()):
            self._deposit.model(key.hex(), fields)
        elif kind == TOKENIZER and self._options.wants_tokenizer(key.hex()):
            self._deposit.tokenizer(key.hex(), fields)

    def _take_root(self, body: bytearray) -> None:
        digest, record = _split(body)
        root, _ = unpack_root(digest, record)
        if root.digest != digest:
            raise CorruptDataError("an identity whose fields do not give its digest")
        check_root(root)
        self._num_roots += 1
        self._root, self._path, self._last, self._layout = root, b"", None, None
        options = self._options
        if not options.wants_model(root.weights_id) or not options.wants_tokenizer(root.tokenizer_id):
            self._target = None
        elif options.namespace is None:
            self._target = root
        else:
            if self._source_namespace not in (None, root.namespace):
                _refuse_to_merge()
            self._source_namespace = root.namespace
            self._target = replace(root, namespace=options.namespace)

    def _take_path(self, body: bytearray) -> None:
        if len(body) % TOKEN_BYTES:
            raise CorruptDataError(f"{len(body)} bytes are no tokens")
        self._path = bytes(body)
        if self._target is not None:
            self._layout = self._deposit.layout_after(self._target, self._path)

    def _take_span(self, body: bytearray) -> None:
        node, data = _split(body)
        record = NodeRecord.unpack(node, data)
        name = node.hex()[:12]
        if record.root != self._root:
            raise CorruptDataError(f"span {name} is of another identity than those around it")
        if record.start > num_tokens(self._path):
            raise CorruptDataError(f"span {name} stands on tokens that are not in the archive")
        check_record(record)
        path = self._path[: record.start * TOKEN_BYTES] + record.span
        child_hash = PrefixHasher(record.root.digest, path).at(record.start)
        if record.child_hash != child_hash or node_id(child_hash, record.span) != node:
            raise CorruptDataError(f"span {name} belongs to other tokens, or to another identity")
        if self._layout not in (None, record.layout):
            raise CorruptDataError(f"span {name} is laid out otherwise than what it stands on, or stands beside")
        self._options.check_node(node)
        blobs = self._read_blobs(node, record)
        self._path, self._last, self._layout, self._position = path, record, record.layout, record.start
        self._series = b""
        if self._target is None:
            self.report.spans_filtered += 1
        else:
            self._deposit.span(self._target, path, record, blobs)
        self.report.num_spans += 1
        self.report.num_tokens += record.num_tokens
        self._blob_bytes += record.size_bytes

    def _read_blobs(self, node: bytes, record: NodeRecord) -> dict[str, bytearray]:
        blobs = {}
        most = self._options.max_blob_bytes
        for kind, entry in record.blobs.items():
            if entry.size_bytes > most:
                hint = "allow it with --max-blob-bytes if you know where the archive comes from"
                raise CorruptDataError(f"a blob of {entry.size_bytes:,} bytes, where {most:,} are allowed", hint)
            _, blob, _ = self._frames.read({BLOB: entry.size_bytes})
            if len(blob) != entry.size_bytes or checksum(node + kind.encode(), blob) != entry.checksum:
                raise CorruptDataError(f"blob {kind} of span {node.hex()[:12]} is not that of its record")
            blobs[kind] = blob
        return blobs

    def _take_activations(self, body: bytearray) -> None:
        assert self._last is not None
        end = NAME_BYTES + int.from_bytes(body[:NAME_BYTES], "little")
        name, blob = bytes(body[NAME_BYTES:end]), memoryview(body)[end:]
        if name <= self._series:
            raise CorruptDataError("recorded activations that come twice, or out of order")
        self._series = name
        series, entry = check_activations(self._last, name, blob)
        if self._target is not None and self._options.with_activations:
            self._deposit.activations(self._target, self._path, self._last, series, entry)
        self.report.num_activations += 1
        self._blob_bytes += CHECKSUM_BYTES + len(blob)

    def _take_logits(self, body: bytearray) -> None:
        assert self._last is not None  # such a frame is read after a span only
        position = int.from_bytes(body[:POSITION_BYTES], "little")
        if not self._position < position <= self._last.end:
            raise CorruptDataError(f"logits after {position:,} tokens, which is not inside their span")
        self._position = position
        blob = memoryview(body)[POSITION_BYTES:]
        if self._target is not None:
            self._deposit.logits(self._target, self._path, position, blob)
        self.report.num_logits += 1
        self._blob_bytes += logits_bytes(blob)

    def _check_totals(self, body: bytearray, digest: bytes) -> None:
        fields = unpack_record(DONE_KEY, memoryview(body))
        if fields.get("digest") != digest:
            raise CorruptDataError("the digest over all of it does not hold")
        report = self.report
        read = totals(self._num_roots, report.num_spans, report.num_tokens, report.num_logits, self._blob_bytes)
        if self._frames.version > VERSION_WITHOUT_ACTIVATIONS:
            read["num_activations"] = report.num_activations
        if any(fields.get(name) != number for name, number in read.items()):
            raise CorruptDataError("the totals at its end are not those of what came before")
        if not self._frames.at_end():
            raise CorruptDataError("something follows its end")


def totals(num_roots: int, num_spans: int, num_tokens: int, num_logits: int, blob_bytes: int) -> dict[str, int]:
    """Return the fields of the frame at the end of an archive."""
    return {
        "num_roots": num_roots,
        "num_spans": num_spans,
        "num_tokens": num_tokens,
        "num_logits": num_logits,
        "blob_bytes": blob_bytes,
    }


def logits_bytes(blob: bytes | bytearray | memoryview) -> int:
    """Return what logits count in a store's totals: their blob, its checksum, and the ID of their span."""
    return len(blob) + CHECKSUM_BYTES + DIGEST_BYTES


def _split(body: bytearray) -> tuple[bytes, memoryview]:
    """Return the digest at the start of a body, and the record behind it."""
    if len(body) <= DIGEST_BYTES:
        raise CorruptDataError(f"a frame of {len(body)} bytes")
    return bytes(body[:DIGEST_BYTES]), memoryview(body)[DIGEST_BYTES:]


def _refuse_to_merge() -> None:
    raise StoreError(
        "the archive holds several namespaces, which must not become one",
        "export them one by one: `promptdb export --namespace NAME FILE`",
    )
