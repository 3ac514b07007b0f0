"""First tokens of prompts that an intervention does not touch: computed by the plain model, stored under both.

Both identities have all of their spans: a lookup of one never looks at the other. What is shared is the computation,
which costs far more than the copy. No torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from promptdb.blobs import Blob
from promptdb.commits import Bytes, PutRequest, SpanPayload
from promptdb.errors import CorruptDataError
from promptdb.format import KV_BLOB, LOGPROBS_BLOB, NodeRecord
from promptdb.intake import own_logits, own_tensors, trim
from promptdb.keys import TOKEN_BYTES, Root, num_tokens, prefix_digests
from promptdb.tokens import Prompt

if TYPE_CHECKING:
    from promptdb.db import PromptDB
    from promptdb.engine import Engine
    from promptdb.snapshot import Snapshot

# Fewer are computed faster than they are fetched and stored again.
LEAST_SHARED_TOKENS = 16


class _Span(NamedTuple):
    """Positions ``[start, end)`` of a prompt, from a stored span."""

    start: int
    end: int
    record: NodeRecord
    blobs: dict[str, Blob]

    def payload(self, position: int) -> SpanPayload:
        """Return it without what is before a position."""
        start, offset = max(self.start, position), self.record.start
        kept = trim(self.record, self.blobs, start - offset, self.end - offset)
        blobs: dict[str, Bytes] = {**kept}
        compute_s = self.record.compute_s * (self.end - start) / self.record.num_tokens
        return SpanPayload(start, self.end, self.record.layout, blobs, compute_s, self.record.provenance)


def adopt(db: PromptDB, source: Root, target: Root, packed: bytes) -> int:
    """Store under ``target`` what is stored of a prompt under ``source``, where the two are known to be the same.

    Parameters
    ----------
    source, target : identities. That all of the prompt's tokens give the same under both is the caller's to know.
    packed : packed tokens.

    Returns
    -------
    int
        How many tokens are new under ``target``. What is damaged is left out.

    Raises
    ------
    QuotaExceededError, ReadOnlyStoreError, StoreFullError, StoreError
        Nothing was stored.

    Notes
    -----
    One transaction, durable. In memory: keys and values of what is new.
    """
    try:
        with db.read() as snapshot:
            own, other = snapshot.match(target, packed), snapshot.match(source, packed)
            if (other.num_tokens, other.has_logits) <= (own.num_tokens, own.has_logits):
                return 0
            spans = [
                _read(snapshot, step.node, max(step.start, own.num_tokens), step.end)
                for step in other.steps
                if step.end > own.num_tokens
            ]
            ends = sorted({own.num_tokens, other.num_tokens, *(step.end for step in other.steps)} - {0})
            ends = [end for end in ends if end >= own.num_tokens]
            logits: dict[int, Bytes] = {}
            for end, digest in zip(ends, prefix_digests(source.digest, packed, ends), strict=True):
                view = snapshot.logits(digest)
                if view is not None:
                    logits[end] = own_logits(view)
    except CorruptDataError:
        return 0  # whoever computes it takes it out
    request = PutRequest(
        target,
        packed[: other.num_tokens * TOKEN_BYTES],
        own.num_tokens,
        lambda position: [span.payload(position) for span in spans if span.end > position],
        logits,
    )
    return db.put_many([request])[0].num_tokens


def _read(snapshot: Snapshot, node: bytes, start: int, end: int) -> _Span:
    record = snapshot.record(node)
    blobs = {}
    for kind in (KV_BLOB, LOGPROBS_BLOB):
        tensors = None if record is None else snapshot.blob(node, record, kind)
        if tensors is None or record is None:
            raise CorruptDataError(f"span {node[:8].hex()} has no {kind}")
        blobs[kind] = own_tensors(record, kind, tensors)
    assert record is not None
    return _Span(start, end, record, blobs)


class Untouched:
    """Lets the plain model compute the first tokens of an intervened engine's prompts, and adopts them.

    Parameters
    ----------
    db : the store of both.
    count : how many first tokens of any prompt no hook touches.
    plain : makes an engine of the same model and tokenizer without an intervention; called once, when it is needed.
    """

    def __init__(self, db: PromptDB, count: int, plain: Callable[[], Engine]) -> None:
        self._db, self._count, self._make = db, count, plain
        self._plain: Engine | None = None
        self._lock = threading.Lock()

    def share(self, root: Root, prompts: Sequence[Prompt]) -> list[int]:
        """Make sure that the untouched tokens of prompts are stored, under the plain identity and under ``root``.

        Returns
        -------
        list of int
            How many tokens the model computed for each prompt.

        Raises
        ------
        As :meth:`Engine.run`.
        """
        heads = [self._head(root, prompt) for prompt in prompts]
        computed = [0] * len(prompts)
        wanted = [at for at, head in enumerate(heads) if head is not None]
        if not wanted:
            return computed
        with self._lock:
            if self._plain is None:
                self._plain = self._make()
        source = replace(root, intervention_id="")
        if self._plain.root != source:
            return computed  # the model is being changed: whoever asked will notice
        lacking = [heads[at] for at in wanted]
        for at, found in zip(wanted, self._plain.run(lacking), strict=True):
            computed[at] = found.tokens_computed
        self._plain.flush()
        for head in lacking:
            assert head is not None
            adopt(self._db, source, root, head.packed)
        return computed

    def _head(self, root: Root, prompt: Prompt) -> Prompt | None:
        """Return the untouched part of a prompt, or None if all of it is stored under ``root``."""
        count = min(self._count, prompt.num_tokens)
        if count < LEAST_SHARED_TOKENS:
            return None
        packed = prompt.packed[: count * TOKEN_BYTES]
        with suppress(CorruptDataError), self._db.read() as snapshot:
            match = snapshot.match(root, packed)
            if match.num_tokens == count and (match.has_logits or count < prompt.num_tokens):
                return None
        return Prompt(packed, tuple(at for at in prompt.boundaries if at < num_tokens(packed)), piece_ends=None)

    def close(self) -> None:
        """Close the plain engine, if there is one."""
        if self._plain is not None:
            self._plain.close()
