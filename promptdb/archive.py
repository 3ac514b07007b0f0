"""Moving representations between stores: one file with spans, their identities and checksums. See docs/moving.md.

An archive is written and read front to back, one span at a time. Writing takes a snapshot for each span, so it stops
nobody; reading trusts nothing in the file, and skips what the store has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from promptdb.db import PromptDB
from promptdb.deposit import ImportReport
from promptdb.errors import CorruptDataError
from promptdb.format import ACTIVATIONS, CHECKSUM_BYTES, FORMAT_VERSION, TOTALS, NodeRecord, pack_record, pack_root
from promptdb.frames import (
    ARCHIVE_VERSION,
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
    FrameWriter,
)
from promptdb.incoming import LIMITS, NAME_BYTES, POSITION_BYTES, ImportOptions, Incoming, logits_bytes, totals
from promptdb.intake import described
from promptdb.keys import DIGEST_BYTES, TOKEN_BYTES, Root
from promptdb.outgoing import Outgoing, OutgoingSpan, prefix_of
from promptdb.streams import File, destination, source
from promptdb.version import __version__

__all__ = [
    "BrokenArchiveError",
    "ExportReport",
    "ImportOptions",
    "ImportReport",
    "Selection",
    "check_archive",
    "export_nodes",
    "import_archive",
]

Roots = list[tuple[Root, dict[str, int]]]
Progress = Callable[[int], object]


class BrokenArchiveError(CorruptDataError):
    """An archive that ends too early, is damaged, or holds what cannot be. ``report`` says what was stored of it."""

    def __init__(self, message: str, hint: str, report: ImportReport) -> None:
        super().__init__(message, hint)
        self.report = report


@dataclass(frozen=True)
class Selection:
    """Which spans to export; by default all that can be found in the store.

    Parameters
    ----------
    node : ID of a span: it, all that stands on it, and what it stands on itself.
    weights_ids : only spans of these models.
    namespace : only spans of this namespace; ``""`` is the one without a name.
    tag : only spans of prompts that have this tag; see :meth:`PromptDB.tag`. Not with ``node``.
    with_prefix : with ``node``, write the spans that it stands on too. Otherwise the archive can only be imported where
        those are.
    with_activations : write what was recorded of the spans as well. Such an archive is of version 2.
    """

    node: bytes | None = None
    weights_ids: frozenset[str] | None = None
    namespace: str | None = None
    tag: str | None = None
    with_prefix: bool = True
    with_activations: bool = True

    def wants(self, root: Root) -> bool:
        """Return whether spans of a root are selected."""
        return (self.weights_ids is None or root.weights_id in self.weights_ids) and (
            self.namespace is None or root.namespace == self.namespace
        )


@dataclass
class ExportReport:
    """What an archive holds.

    Attributes
    ----------
    num_roots, num_spans, num_tokens, num_logits, num_activations : written. Of activations, entries: each of a span,
        point, layer and dtype.
    blob_bytes : of their blobs, logits and activations, as the totals of a store count them.
    num_bytes : size of the archive.
    num_damaged : spans left out because they are damaged or have no keys and values. What stands on them is left out
        too, and not counted.
    num_damaged_entries : recorded activations left out because they are damaged.
    digest : BLAKE3 over the archive up to its last frame, hex.
    """

    num_roots: int = 0
    num_spans: int = 0
    num_tokens: int = 0
    num_logits: int = 0
    num_activations: int = 0
    blob_bytes: int = 0
    num_bytes: int = 0
    num_damaged: int = 0
    num_damaged_entries: int = 0
    digest: str = ""


def _no_progress(num_bytes: int) -> None:
    pass


def export_nodes(
    db: PromptDB,
    selection: Selection,
    file: File,
    *,
    overwrite: bool = False,
    progress: Progress = _no_progress,
) -> ExportReport:
    """Write spans of a store to an archive.

    Parameters
    ----------
    db : the store; others may write to it meanwhile. Spans that are put or removed during the export may be in the
        archive or not; every span in it is whole, and stands on spans that are in it.
    file : path, or a binary stream, which is not closed. A file appears complete or not at all: it is written as
        ``FILE.part``, synced and renamed. It is private to the user. Pipes and devices are written directly.
    overwrite : replace a file that is there.
    progress : called with the bytes written so far.

    Returns
    -------
    ExportReport

    Raises
    ------
    NodeNotFoundError
        There is no such span, or what it stands on is gone.
    CorruptDataError
        The span that was asked for, one that it stands on, or a root is damaged. Other damaged spans are left out.
    StoreError
        The file is there, or cannot be written.

    Notes
    -----
    Memory: one span, and 32 bytes for each position where spans attach. Reads each position of every span: a few
    microseconds a token. Thread safe.
    """
    target = None if selection.node is None else prefix_of(db, selection.node)
    tagged = None if selection.tag is None else db.tagged(selection.tag)
    roots = [item for item in db.roots() if selection.wants(item[0]) and (target is None or item[0] == target[0].root)]
    roots.sort(key=lambda item: tuple(vars(item[0]).values()))
    with destination(file, overwrite) as stream:
        frames = FrameWriter(stream, _version(db, selection))
        return _Export(db, selection, frames, progress).run(roots, target, tagged)


def _version(db: PromptDB, selection: Selection) -> int:
    """Return the version of an archive: a later one only where older programs would miss something."""
    with db.read() as snapshot:
        has_activations = next(snapshot.reader.keys(ACTIVATIONS), None) is not None
    return ARCHIVE_VERSION if has_activations and selection.with_activations else VERSION_WITHOUT_ACTIVATIONS


class _Export:
    """Writes one archive."""

    def __init__(self, db: PromptDB, selection: Selection, frames: FrameWriter, progress: Progress) -> None:
        self._db = db
        self._selection = selection
        self._frames = frames
        self._progress = progress
        self._report = ExportReport()

    def run(self, roots: Roots, target: tuple[NodeRecord, bytes] | None, tagged: set[bytes] | None) -> ExportReport:
        """Write everything, or of it only the spans ``tagged``, or what goes with ``target``: the record of a span, and
        the packed tokens to its end."""
        frames, report = self._frames, self._report
        frames.write(MANIFEST, pack_record(MANIFEST_KEY, self._manifest(roots)))
        self._write_entries([root for root, _ in roots])
        for root, amounts in roots:
            frames.write(ROOT, root.digest, pack_root(root, amounts))
            report.num_roots += 1
            outgoing = Outgoing(self._db, root, only=tagged)
            for span in outgoing.everything() if target is None else self._subtree(outgoing, *target):
                self._write_span(outgoing, span)
            report.num_damaged += outgoing.num_damaged
            report.num_damaged_entries += outgoing.num_damaged_entries
        digest = frames.digest()
        counted = totals(report.num_roots, report.num_spans, report.num_tokens, report.num_logits, report.blob_bytes)
        if frames.version > VERSION_WITHOUT_ACTIVATIONS:
            counted["num_activations"] = report.num_activations
        frames.write(DONE, pack_record(DONE_KEY, {**counted, "digest": digest}))
        report.digest, report.num_bytes = digest.hex(), frames.num_bytes
        return report

    def _subtree(self, outgoing: Outgoing, record: NodeRecord, prefix: bytes) -> Iterator[OutgoingSpan]:
        selection = self._selection
        assert selection.node is not None
        if not selection.with_prefix:
            self._frames.write(PATH, prefix[: record.start * TOKEN_BYTES])
        return outgoing.subtree(selection.node, record.start, prefix, with_prefix=selection.with_prefix)

    def _manifest(self, roots: Roots) -> dict[str, object]:
        selection = self._selection
        return {
            "created_by": f"promptdb {__version__}",
            "created_unix_s": time.time(),
            "store_format": FORMAT_VERSION,
            "chunk_tokens": self._db.chunk_tokens,
            "selection": {
                "node": selection.node.hex() if selection.node else "",
                "weights_ids": sorted(selection.weights_ids or ()),
                "namespace": selection.namespace,
                "tag": selection.tag,
                "with_prefix": selection.with_prefix,
                "with_activations": selection.with_activations,
            },
            "num_roots": len(roots),
            "num_namespaces": len({root.namespace for root, _ in roots}),
            "expected": {name: sum(amounts[name] for _, amounts in roots) for name in TOTALS},
        }

    def _write_entries(self, roots: list[Root]) -> None:
        registry = self._db.registry
        for identity in sorted({root.weights_id for root in roots}):
            known = registry.model(identity) if _is_digest(identity) else None
            description = described(known) if known else None
            if description is not None:
                key = bytes.fromhex(identity)
                self._frames.write(MODEL, key, pack_record(key, description))
        for identity in sorted({root.tokenizer_id for root in roots}):
            known = registry.tokenizer(identity) if _is_digest(identity) else None
            if known is not None and known.get("json"):
                key = bytes.fromhex(identity)
                record = pack_record(key, known)
                if len(key) + len(record) <= LIMITS[TOKENIZER]:
                    self._frames.write(TOKENIZER, key, record)

    def _write_span(self, outgoing: Outgoing, span: OutgoingSpan) -> None:
        frames, report = self._frames, self._report
        frames.write(NODE, span.node, span.record.pack(span.node))
        for blob in span.blobs.values():
            frames.write(BLOB, blob)
        report.num_spans += 1
        report.num_tokens += span.record.num_tokens
        report.blob_bytes += span.record.size_bytes
        if frames.version > VERSION_WITHOUT_ACTIVATIONS:
            for name, blob in outgoing.activations(span):
                frames.write(RECORDED, len(name).to_bytes(NAME_BYTES, "little"), name, blob)
                report.num_activations += 1
                report.blob_bytes += CHECKSUM_BYTES + len(blob)
                self._progress(frames.num_bytes)
        for position, digest in span.logits:
            logits = outgoing.logits(digest)
            if logits is not None:
                frames.write(LOGITS_AFTER, position.to_bytes(POSITION_BYTES, "little"), logits)
                report.num_logits += 1
                report.blob_bytes += logits_bytes(logits)
        self._progress(frames.num_bytes)


def _is_digest(identity: str) -> bool:
    try:
        return len(bytes.fromhex(identity)) == DIGEST_BYTES
    except ValueError:
        return False


def import_archive(
    db: PromptDB,
    file: File,
    options: ImportOptions | None = None,
    *,
    progress: Progress = _no_progress,
) -> ImportReport:
    """Store what an archive holds and the store does not.

    Nothing in the file is believed: sizes and counts are bounded before memory is taken, digests and node IDs are
    computed again from identity and tokens, tensors are compared with their records, and NaN in keys and values is
    refused. What cannot be checked so is whether the numbers are those of the model: an archive is as good as who wrote
    it. Everything that was stored is durable when this returns or raises. After a crash, import again: what is stored
    is skipped.

    Parameters
    ----------
    file : path, or a binary stream, which is not closed.
    options : ``wants_model(weights_id)`` and ``wants_tokenizer(tokenizer_id)`` choose; ``namespace`` moves all spans
        into another one, which an archive with several refuses; ``max_blob_bytes`` is the largest blob accepted;
        ``with_activations=False`` leaves recorded activations out.
    progress : called with the bytes read so far.

    Returns
    -------
    ImportReport

    Raises
    ------
    BrokenArchiveError
        The archive is damaged, cut off, or holds what cannot be. What came before is stored; see its ``report``.
    FormatVersionError
        It was written by a newer version.
    StoreError
        The file cannot be read, the store cannot be written, or the archive has several namespaces that would become
        one.

    Notes
    -----
    Memory: one span, and a batch of 16 MiB, twice while it is written. Transactions are as large as a batch. Not bound
    to the cuts of the store: spans are stored as they are in the file, and cut off where the store has their first
    tokens.
    """
    return _read(db, file, options or ImportOptions(), progress)


def check_archive(
    file: File, options: ImportOptions | None = None, *, progress: Progress = _no_progress
) -> ImportReport:
    """Check an archive as :func:`import_archive` does, without a store. Raises the same."""
    return _read(None, file, options or ImportOptions(), progress)


def _read(db: PromptDB | None, file: File, options: ImportOptions, progress: Progress) -> ImportReport:
    with source(file) as stream:
        try:
            frames = FrameReader(stream)
        except CorruptDataError as error:
            raise BrokenArchiveError(error.message, error.hint, ImportReport()) from error
        incoming = Incoming(db, frames, options, progress)
        try:
            incoming.run()
        except CorruptDataError as error:
            report = incoming.report
            where = f"the archive does not hold at byte {report.num_bytes:,}, after {report.num_spans:,} spans"
            stored = "nothing of it was stored"
            if report.spans_stored:
                stored = (
                    f"{report.spans_stored:,} spans are stored, all of them verified; import the whole file to go on"
                )
            hint = "; ".join(filter(None, (error.hint, stored if db is not None else "")))
            raise BrokenArchiveError(f"{where}: {error.message}", hint, report) from error
        return incoming.report
