"""Writing what an engine computed: encoded at once, committed behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from promptdb.cache import PromptCache, layout_of
from promptdb.commits import PutReport, SpanPayload
from promptdb.kv import encode_logits, encode_span, trim_blobs
from promptdb.writer import WriteBehind

if TYPE_CHECKING:
    from promptdb.db import PromptDB
    from promptdb.keys import Root


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
        self.queue = WriteBehind()

    def store(
        self,
        root: Root,
        packed: bytes,
        spans: Sequence[tuple[int, int]],
        cache: PromptCache,
        logprobs: torch.Tensor,
        logits: Mapping[int, torch.Tensor],
        *,
        compute_s_per_token: float,
        provenance: Mapping[str, str | int | float],
    ) -> None:
        """Encode spans and logits of a prompt of n tokens, and commit them, now or behind.

        Parameters
        ----------
        spans : (start, end) of the spans to store; may be empty, if only logits are new.
        cache : holds at least the last span's end. It may be changed once this returns.
        logprobs : ``[n]`` float32, NaN first.
        logits : by position i, the logits ``[vocabulary]`` after ``[0, i + 1)``.

        Raises
        ------
        NonFiniteError
            The result holds NaN or infinity; nothing is stored.
        WriteBehindError, StoreError
            This commit, or one before it, failed.
        """
        layout = layout_of(cache)
        payloads = [
            SpanPayload(
                start,
                end,
                layout,
                encode_span(cache, layout, start, end, logprobs[start:end]),
                compute_s_per_token * (end - start),
                provenance,
            )
            for start, end in spans
        ]
        blobs = {at + 1: encode_logits(row) for at, row in logits.items()}
        first = spans[0][0] if spans else len(packed) // 4

        def commit() -> PutReport:
            return self._db.put(root, packed, first, lambda position: from_position(payloads, position), blobs)

        if not self._write_behind:
            commit()
            return
        size_bytes = sum(len(blob) for payload in payloads for blob in payload.blobs.values())
        self.queue.submit(root, packed, blobs, commit, size_bytes + sum(map(len, blobs.values())))


def from_position(payloads: Sequence[SpanPayload], position: int) -> list[SpanPayload]:
    """Return the payloads from ``position`` on; one that begins before it loses its first tokens."""
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
                trim_blobs(payload.blobs, payload.layout, position - payload.start),
                payload.compute_s * left / (payload.end - payload.start),
                payload.provenance,
            )
        )
    return kept
