"""Reading the blobs of the spans that cover a prompt, inside one snapshot."""

from __future__ import annotations

from array import array

from promptdb.blobs import TensorView
from promptdb.errors import CorruptDataError
from promptdb.format import LOGPROBS_BLOB, NodeRecord
from promptdb.keys import prefix_digests
from promptdb.snapshot import Match, Snapshot
from promptdb.trie import Step

REPAIR = "damaged spans are replaced when they are computed again: `promptdb put`"


def record_of(snapshot: Snapshot, step: Step) -> NodeRecord:
    """Return the record of a step of a match that was made in this snapshot."""
    record = snapshot.record(step.node)
    if record is None:
        raise CorruptDataError(f"the record of node {step.node[:8].hex()} is missing", REPAIR)
    return record


def stored_logits(snapshot: Snapshot, match: Match) -> TensorView | None:
    """Return the logits after the stored prefix, or None if they are not stored."""
    if not match.has_logits:
        return None
    (end,) = prefix_digests(match.root.digest, match.packed, [match.num_tokens])
    return snapshot.logits(end)


def stored_logprobs(snapshot: Snapshot, match: Match) -> array[float]:
    """Return the log-probability of each token of the stored prefix; NaN for the first.

    Raises
    ------
    CorruptDataError
        A span has none, or they do not fit it.
    """
    found = array("f")
    for step in match.steps:
        tensors = snapshot.blob(step.node, record_of(snapshot, step), LOGPROBS_BLOB) or {}
        view = tensors.get("token_logprobs")
        if view is None or view.shape != (step.span_tokens,):
            raise CorruptDataError(f"node {step.node[:8].hex()} has no log-probabilities of its tokens", REPAIR)
        found += view.floats()[: step.num_tokens]
    return found
