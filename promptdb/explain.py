"""Why a prompt is stored or not. Reads the store only: no model, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from promptdb.cost import CostModel, Estimate
from promptdb.db import PromptDB
from promptdb.keys import TOKEN_BYTES, PrefixHasher, Root, num_tokens, unpack_tokens
from promptdb.snapshot import Match, Snapshot
from promptdb.trie import Step, children


@dataclass(frozen=True)
class OtherRoot:
    """A root that holds more of the prompt, and the identity fields in which it differs."""

    root: Root
    num_tokens: int
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What is stored of a prompt of n tokens, and why no more is.

    Attributes
    ----------
    num_tokens, num_stored : length of the prompt, and of its longest stored prefix.
    has_logits : whether the logits after that prefix are stored.
    reason : one sentence.
    expected, stored_next : the prompt's first token that is not stored, and the tokens that stored prompts have there
        instead (at most ten).
    other_roots : identities under which more of the prompt is stored, most first.
    steps : the spans that cover the prefix.
    cost : loading against computing the stored prefix, in seconds.
    """

    num_tokens: int
    num_stored: int
    has_logits: bool
    reason: str
    expected: int | None
    stored_next: tuple[int, ...]
    other_roots: tuple[OtherRoot, ...]
    steps: tuple[Step, ...]
    cost: Estimate

    @property
    def is_complete(self) -> bool:
        """Whether the whole prompt can be had without computing."""
        return self.has_logits and self.num_stored == self.num_tokens


def explain(
    db: PromptDB, root: Root, packed: bytes, cost: CostModel | None = None, usable: Match | None = None
) -> Explanation:
    """Explain a lookup.

    Parameters
    ----------
    packed : the prompt's packed tokens.
    cost : measured rates; by default those that the store remembers of the model.
    usable : what an engine uses of what is stored, where that may be less.

    Notes
    -----
    One lookup per root of the store.
    """
    with db.read() as snapshot:
        match = snapshot.match(root, packed)
        total, stored = num_tokens(packed), match.num_tokens
        others = []
        for other, _ in db.roots():
            # A tenant learns nothing about another one.
            if other != root and other.namespace == root.namespace:
                reached = snapshot.match(other, packed).num_tokens
                if reached > stored:
                    different = tuple(
                        field.name for field in fields(Root) if getattr(other, field.name) != getattr(root, field.name)
                    )
                    others.append(OtherRoot(other, reached, different))
        others.sort(key=lambda each: -each.num_tokens)
        following = _following(snapshot, match.steps, root, packed, stored) if stored < total else ()
    reason = _reason(root, total, match, following, others, bool(db.stat()["num_nodes"]))
    if usable is not None and (usable.num_tokens, usable.has_logits) < (stored, match.has_logits):
        reason = (
            f"{stored} tokens are stored, of which a strict engine uses {usable.num_tokens}: the rest was computed in "
            "another way, or not in one pass"
        )
        match, stored, following = usable, usable.num_tokens, ()
    expected = _token(match) if stored < total else None
    if cost is None:
        cost = CostModel(db.registry.model(root.weights_id))
    return Explanation(
        total,
        stored,
        match.has_logits,
        reason,
        expected,
        following,
        tuple(others),
        match.steps,
        cost.estimate(stored),
    )


def _token(match: Match) -> int:
    """Return the prompt's first token that a match lacks."""
    at = match.num_tokens * TOKEN_BYTES
    return unpack_tokens(match.packed[at : at + TOKEN_BYTES])[0]


def _following(snapshot: Snapshot, steps: Sequence[Step], root: Root, packed: bytes, stored: int) -> tuple[int, ...]:
    """Return the tokens that stored prompts go on with after the first ``stored`` tokens of this one."""
    found = []
    if steps and steps[-1].num_tokens < steps[-1].span_tokens:
        record = snapshot.record(steps[-1].node)
        if record is not None:
            at = steps[-1].num_tokens * TOKEN_BYTES
            found.append(unpack_tokens(record.span[at : at + TOKEN_BYTES])[0])
    for _, span in children(snapshot.reader, PrefixHasher(root.digest, packed).at(stored)):
        found.append(unpack_tokens(span[:TOKEN_BYTES])[0])
        if len(found) >= 10:
            break
    return tuple(dict.fromkeys(found))


def _reason(
    root: Root, total: int, match: Match, following: Sequence[int], others: Sequence[OtherRoot], any_nodes: bool
) -> str:
    stored = match.num_tokens
    if stored == total:
        return (
            "everything is stored"
            if match.has_logits
            else "all tokens are stored, but not the logits after the last one"
        )
    if others:
        names = {
            "weights_id": "other weights",
            "tokenizer_id": "another tokenizer",
            "intervention_id": "another intervention",
            "kv_codec": "approximate keys and values" if others[0].root.kv_codec else "exact keys and values",
        }
        differing = " and ".join(names.get(name, name) for name in others[0].fields)
        return f"{others[0].num_tokens} tokens are stored with {differing}"
    if not any_nodes:
        return "the store is empty"
    if stored == 0 and not following:
        where = f" in namespace {root.namespace!r}" if root.namespace else ""
        return f"nothing is stored for this model and tokenizer{where}"
    if following:
        what = (
            "no stored prompt starts"
            if stored == 0
            else f"stored prompts part from this one at token {stored}: none goes on"
        )
        return f"{what} with token {_token(match)}"
    return f"the stored prompt ends after {stored} tokens"
