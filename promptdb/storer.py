"""Writing what an engine computed: encoded at once, committed behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from promptdb.activations import Series
from promptdb.commits import PutRequest, SpanPayload
from promptdb.kv import KvSource, encode_logits, encode_span, trim_blobs
from promptdb.scores import TokenScores
from promptdb.writer import WriteBehind

if TYPE_CHECKING:
    from promptdb.cache import PromptCache
    from promptdb.db import PromptDB
    from promptdb.keys import Root


Beside = Callable[["PromptCache", int, int], Sequence[tuple[Series, memoryview]]]


class Storer:
    """Stores computed spans of prompts in one store. Thread safe.

    Parameters
    ----------
    db : the store.
    write_behind : commit in a background thread.
    """

    def __init__(self, db: PromptDB, *, write_behind: bool) -> None:
        self._db = db
        self._write_behind = write_behind
        self.queue = WriteBehind(db.put_many)
        self._together = threading.local()  # requests: what this thread has collected
        # What else is stored with tokens [start, end) of a cache: set by whoever records, under the engine's lock.
        self.beside: Beside | None = None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Commit what this thread stores inside the block in one transaction, at the end of the block.

        What was stored before an error is committed as well, as it would be outside. All of it is in memory until then,
        and lookups do not find it: a block is one pass of the model, not a batch. Blocks inside count as the outer one.
        With write-behind there is nothing to collect, as the queue groups what waits.

        Raises
        ------
        StoreError
            Nothing of the block is stored.
        """
        if self._write_behind or getattr(self._together, "requests", None) is not None:
            yield
            return
        requests: list[PutRequest] = []
        self._together.requests = requests
        try:
            yield
        finally:
            self._together.requests = None
            self._db.put_many(requests)

    def store(
        self,
        root: Root,
        packed: bytes,
        spans: Sequence[tuple[int, int]],
        source: KvSource,
        scores: TokenScores,
        logits: Mapping[int, torch.Tensor],
        *,
        compute_s_per_token: float,
        provenance: Mapping[str, str | int | float],
        shift: int = 0,
    ) -> None:
        """Encode spans and logits of a prompt of n tokens, and commit them: now, behind, or :meth:`together`.

        Parameters
        ----------
        spans : (start, end) of the spans to store; may be empty, if only logits are new.
        source : holds the tokens of all spans. Its cache may be changed once this returns.
        scores : of the tokens of the spans, from the first one's start to the last one's end.
        logits : by position i, the logits ``[vocabulary]`` after ``[0, i + 1)``.
        shift : the token at position i of the prompt is the one at position ``i + shift`` of the cache.

        Raises
        ------
        NonFiniteError
            The result holds NaN or infinity; nothing is stored.
        WriteBehindError, StoreError
            This commit, or one before it, failed.
        """
        first = spans[0][0] if spans else len(packed) // 4
        beside = self.beside
        payloads = [
            SpanPayload(
                start,
                end,
                source.layout,
                encode_span(source, start + shift, end + shift, scores[start - first : end - first], root.kv_codec),
                compute_s_per_token * (end - start),
                provenance,
                () if beside is None else beside(source.cache, start + shift, end + shift),
            )
            for start, end in spans
        ]
        blobs = {at + 1: encode_logits(row) for at, row in logits.items()}
        request = PutRequest(root, packed, first, lambda position: from_position(payloads, position), blobs)
        collected = getattr(self._together, "requests", None)
        if self._write_behind:
            size_bytes = sum(len(blob) for payload in payloads for blob in payload.blobs.values())
            size_bytes += sum(len(value) for payload in payloads for _, value in payload.recorded)
            self.queue.submit(request, size_bytes + sum(map(len, blobs.values())))
        elif collected is not None:
            collected.append(request)
        else:
            self._db.put_many([request])


def from_position(payloads: Sequence[SpanPayload], position: int) -> list[SpanPayload]:
    """Return the payloads from ``position`` on; one that begins before it loses its first tokens.

    What was recorded of that one is left out: a recorder looks at what arrived.
    """
    kept = []
    for payload in payloads:
        if payload.end <= position:
            continue
        if payload.start >= position:
            kept.append(payload)
            continue
        left = payload.end - position
        kept.append(
            SpanPayload(
                position,
                payload.end,
                payload.layout,
                trim_blobs(payload.blobs, position - payload.start),
                payload.compute_s * left / (payload.end - payload.start),
                payload.provenance,
            )
        )
    return kept
