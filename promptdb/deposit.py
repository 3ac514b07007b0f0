"""Putting spans that were read from an archive into a store: what is there is skipped, the rest goes in batches."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from promptdb.activations import Entry, Series, cut_entry
from promptdb.blobs import Blob
from promptdb.commits import Bytes, PutRequest, SpanPayload
from promptdb.db import PromptDB
from promptdb.errors import CorruptDataError, PromptDBError, StoreError
from promptdb.format import CHECKSUM_BYTES, LOGITS, Layout, NodeRecord
from promptdb.intake import check_blobs, check_logits, checked_tokenizer, described, trim
from promptdb.keys import TOKEN_BYTES, PrefixHasher, Root
from promptdb.recordings import RecordedRows
from promptdb.trie import match

_BATCH_BYTES = 16 << 20
_BATCH_SPANS = 256
OTHER_LAYOUT = "a span is laid out otherwise than those of the same weights in the store"


@dataclass
class ImportReport:
    """What an archive held and what became of it.

    Attributes
    ----------
    is_complete : the archive was read to its end, and its totals and digest hold.
    num_spans, num_tokens, num_logits, num_activations : read and verified so far.
    num_bytes : read from the file.
    spans_stored, tokens_stored, logits_stored, bytes_stored : new in the store, and durable.
    spans_present : were in the store already.
    spans_filtered : left out because they are of other models or tokenizers than asked for.
    spans_dropped : not stored, as what they stand on is neither in the archive nor in the store.
    activations_stored, activations_dropped : entries of recorded activations that are new, or have new rows, as the
        store cuts spans; and those not stored, as their span is not.
    models_stored, tokenizers_stored : entries of the registry that were not known.
    tokenizers_unchecked : entries left out because it cannot be told that they belong to their ID.
    models : names by weights ID of the archive's entries.
    """

    is_complete: bool = False
    num_spans: int = 0
    num_tokens: int = 0
    num_logits: int = 0
    num_activations: int = 0
    num_bytes: int = 0
    spans_stored: int = 0
    tokens_stored: int = 0
    logits_stored: int = 0
    bytes_stored: int = 0
    spans_present: int = 0
    spans_filtered: int = 0
    spans_dropped: int = 0
    activations_stored: int = 0
    activations_dropped: int = 0
    models_stored: int = 0
    tokenizers_stored: int = 0
    tokenizers_unchecked: int = 0
    models: dict[str, str] = field(default_factory=dict)


@contextmanager
def _store_at_fault() -> Iterator[None]:
    """Turn damage of the store that is written into an error of the store, not of what is put into it."""
    try:
        yield
    except CorruptDataError as error:
        raise StoreError(f"the store is damaged: {error.message}", "`promptdb verify --fix`, then again") from error


class _Chain:
    """New spans of one prompt that follow each other, and logits, to be stored by one put."""

    def __init__(self, root: Root, packed: bytes, start: int, *, is_shared: bool) -> None:
        self.is_shared = is_shared
        self.root = root
        self.packed = packed
        self.start = start
        self.spans: list[tuple[NodeRecord, Mapping[str, Blob]]] = []
        self.logits: dict[int, Bytes] = {}

    def goes_on_with(self, root: Root, packed: bytes, start: int) -> bool:
        return root == self.root and start * TOKEN_BYTES == len(self.packed) and packed.startswith(self.packed)

    def request(self) -> PutRequest:
        return PutRequest(self.root, self.packed, self.start, self._encode, self.logits, is_shared=self.is_shared)

    def _encode(self, position: int) -> Sequence[SpanPayload]:
        return [_payload(record, blobs, position) for record, blobs in self.spans if record.end > position]

    def num_logits_up_to(self, num_dropped: int) -> int:
        """Return how many of the logits stand on the spans that were not dropped."""
        kept = self.spans[: len(self.spans) - num_dropped]
        end = kept[-1][0].end if kept else self.start
        return sum(position <= end for position in self.logits)


def _payload(record: NodeRecord, blobs: Mapping[str, Blob], position: int) -> SpanPayload:
    """Return a span, without its tokens before ``position``."""
    skip = max(0, position - record.start)
    kept: Mapping[str, Bytes] = trim(record, blobs, skip) if skip else blobs
    compute_s = record.compute_s * (record.num_tokens - skip) / record.num_tokens
    return SpanPayload(record.start + skip, record.end, record.layout, kept, compute_s, record.provenance)


class Deposit:
    """Stores spans, logits and entries of the registry; with no store, it only checks them. Not thread safe.

    Every method raises :class:`CorruptDataError` for what cannot be, and :class:`StoreError` if the store cannot be
    written. ``is_shared`` tells that it all comes from the shared store, and need not go there.
    """

    def __init__(self, db: PromptDB | None, report: ImportReport, *, is_shared: bool = False) -> None:
        self._is_shared = is_shared
        self._db = db
        self._report = report
        self._chains: list[_Chain] = []
        self._recorded: list[tuple[Root, bytes, NodeRecord, Series, Entry]] = []
        self._num_spans = self._size_bytes = 0

    def layout_after(self, root: Root, packed: bytes) -> Layout | None:
        """Return the layout of the span that the store holds at the end of a prompt, if it does."""
        if self._db is None:
            return None
        with _store_at_fault(), self._db.read() as snapshot:
            steps = snapshot.match(root, packed).steps
            record = snapshot.record(steps[-1].node) if steps else None
        return record.layout if record is not None else None

    def span(self, root: Root, packed: bytes, record: NodeRecord, blobs: Mapping[str, Blob]) -> None:
        """Store a span unless it is there. What it stands on was handed in before, or is in the store.

        Parameters
        ----------
        root : identity to store it under.
        packed : packed tokens from position 0 to the end of the span.
        record : of the span; its own root is not used.
        """
        if self._holds(root, packed, record):
            self._report.spans_present += 1
            return
        check_blobs(record, blobs)
        if self._db is None:
            return
        if not self._chains or not self._chains[-1].goes_on_with(root, packed, record.start):
            self._chains.append(_Chain(root, packed, record.start, is_shared=self._is_shared))
        chain = self._chains[-1]
        chain.packed = packed
        chain.spans.append((record, blobs))
        self._grow(1, record.size_bytes)

    def _holds(self, root: Root, packed: bytes, record: NodeRecord) -> bool:
        """Return whether the store has the tokens of a span; refuse the span if it does not fit those."""
        if self._db is None:
            return False
        with _store_at_fault(), self._db.read() as snapshot:
            walk = match(snapshot.reader, root.digest, packed, record.start)
            beside = snapshot.record(walk.steps[0].node) if walk.steps else None
        if beside is not None and beside.layout != record.layout:
            raise CorruptDataError(OTHER_LAYOUT, "it was written by another version of promptdb, or is forged")
        return walk.num_tokens == record.end

    def logits(self, root: Root, packed: bytes, position: int, blob: memoryview) -> None:
        """Store the logits after a position of the last span unless they are there.

        Parameters
        ----------
        packed : packed tokens from position 0 to the end of that span.
        """
        check_logits(blob)
        if self._db is None:
            return
        digest = PrefixHasher(root.digest, packed).at(position)
        with self._db.read() as snapshot:
            if snapshot.reader.size(LOGITS, digest) is not None:
                return
        if not self._chains or (self._chains[-1].root, self._chains[-1].packed) != (root, packed):
            start = len(packed) // TOKEN_BYTES
            self._chains.append(_Chain(root, packed, start, is_shared=self._is_shared))
        self._chains[-1].logits[position] = blob
        self._grow(0, len(blob))

    def activations(self, root: Root, packed: bytes, record: NodeRecord, series: Series, entry: Entry) -> None:
        """Store recorded activations of the last span, which were checked, unless they are there.

        Parameters
        ----------
        packed : packed tokens from position 0 to the end of that span.
        record : of the span, as the archive has it.
        """
        if self._db is not None:
            self._recorded.append((root, packed, record, series, entry))
            self._grow(0, len(entry.rows.data))

    def model(self, weights_id: str, fields: Mapping[str, Any]) -> None:
        """Enter a model into the registry unless it is known."""
        description = described(fields)
        if description is None:
            raise CorruptDataError("a description of a model that cannot be")
        self._report.models[weights_id] = str(description.get("name", ""))
        if self._db is None:
            return
        with _store_at_fault():
            if self._db.registry.model(weights_id) is None:
                self._db.registry.add_model(weights_id, description)
                self._report.models_stored += 1

    def tokenizer(self, tokenizer_id: str, fields: Mapping[str, Any]) -> None:
        """Enter a tokenizer into the registry unless it is known, or cannot be checked."""
        with _store_at_fault():
            if self._db is not None and self._db.registry.tokenizer(tokenizer_id) is not None:
                return
        checked = checked_tokenizer(tokenizer_id, fields)
        if checked is None:
            self._report.tokenizers_unchecked += 1
        elif self._db is not None:
            self._db.registry.add_tokenizer(tokenizer_id, checked)
            self._report.tokenizers_stored += 1

    def _grow(self, num_spans: int, size_bytes: int) -> None:
        self._num_spans += num_spans
        self._size_bytes += size_bytes
        if self._size_bytes >= _BATCH_BYTES or max(self._num_spans, len(self._chains)) >= _BATCH_SPANS:
            self.flush()

    def flush(self) -> None:
        """Store what was collected: spans in one transaction, then what was recorded of them in another.

        If a transaction fails, nothing of it is stored.
        """
        chains, self._chains = self._chains, []
        recorded, self._recorded = self._recorded, []
        self._num_spans = self._size_bytes = 0
        if self._db is None:
            return
        with self._saying_what_is_stored():
            if chains:
                self._put_chains(self._db, chains)
            self._put_recorded(self._db, recorded)

    @contextmanager
    def _saying_what_is_stored(self) -> Iterator[None]:
        try:
            with _store_at_fault():
                yield
        except PromptDBError as error:
            done = f"{self._report.spans_stored:,} spans are stored, and will be skipped when you import again"
            error.hint = f"{error.hint}; {done}" if error.hint else done
            raise

    def _put_chains(self, db: PromptDB, chains: Sequence[_Chain]) -> None:
        report = self._report
        puts = db.put_many([chain.request() for chain in chains])
        for chain, put in zip(chains, puts, strict=True):
            report.bytes_stored += put.num_bytes
            report.spans_stored += put.num_spans
            report.tokens_stored += put.num_tokens
            report.spans_dropped += put.num_dropped
            report.spans_present += len(chain.spans) - put.num_spans - put.num_dropped
            report.logits_stored += chain.num_logits_up_to(put.num_dropped)

    def _put_recorded(self, db: PromptDB, recorded: Sequence[tuple[Root, bytes, NodeRecord, Series, Entry]]) -> None:
        rows: list[RecordedRows] = []
        for root, packed, record, series, entry in recorded:
            with db.read() as snapshot:
                steps = match(snapshot.reader, root.digest, packed).steps
            taken = 0
            for step in steps:  # the store may have cut these tokens in other places
                first, last = (bisect_left(entry.tokens(), at - record.start) for at in (step.start, step.end))
                if first < last:
                    value = bytearray(CHECKSUM_BYTES) + cut_entry(entry, first, last - first, step.start - record.start)
                    rows.append(RecordedRows(step.node, series, value))
                    taken += last - first
            self._report.activations_dropped += taken < entry.num_rows
        report = db.put_activations(rows)
        self._report.activations_stored += report.num_entries
        self._report.bytes_stored += report.num_bytes
