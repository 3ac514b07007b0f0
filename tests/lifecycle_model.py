"""A store with limits in plain Python: dicts, lists and a search of all of them at every step. The oracle of tests.

It knows the rules of docs/lifecycle.md and the sizes of FORMAT.md, and nothing of tables, transactions or counters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from promptdb.blobs import TensorSpec, build_blob
from promptdb.commits import SpanPayload
from promptdb.format import BlobEntry, NodeRecord, checksum
from promptdb.keys import PrefixHasher, Root, node_id, pack_tokens

COARSE_S = 60.0
SPARE_NODES = 256

Tokens = tuple[int, ...]


@dataclass
class Span:
    node: bytes
    root: Root
    tokens: Tokens  # from position 0 to the end of the span
    start: int
    parent: bytes
    size: int
    compute_s: float
    created: float
    used: float
    expires: float
    priority: float = 0.0

    @property
    def end(self) -> int:
        return len(self.tokens)


class TooLarge(Exception):  # noqa: N818
    """A put that the quota leaves no room for."""


def payload(tokens: Tokens, start: int, end: int, compute_s: float) -> SpanPayload:
    """Return a span whose blob holds its tokens, and as many zeros as they ask for: up to 9 kB."""
    packed = pack_tokens(tokens[start:end])
    zeros = 1000 * (sum(tokens[:end]) % 10)
    tensors = [
        (TensorSpec("tokens", "U32", (end - start,)), packed),
        (TensorSpec("zeros", "U8", (zeros,)), bytes(zeros)),
    ]
    return SpanPayload(start, end, (), {"tokens": bytes(build_blob(tensors))}, compute_s, {})


LOGITS_BLOB = bytes(build_blob([(TensorSpec("logits", "F32", (600,)), bytes(2400))]))


class Model:
    """Spans by node ID, pins by (node, name), logits by (root, prefix)."""

    def __init__(self, chunk: int, quota: int, policy: str) -> None:
        self.chunk, self.quota, self.policy = chunk, quota, policy
        self.now = 1000.0
        self.spans: dict[bytes, Span] = {}
        self.logits: dict[tuple[Root, Tokens], bytes] = {}  # -> owner
        self.pins: dict[tuple[bytes, str], float] = {}
        self.ttls: dict[str, float] = {}
        self.pending: dict[bytes, float] = {}
        self.inflation = 0.0

    # Looking

    def walk(self, root: Root, tokens: Tokens) -> list[Span]:
        """Return the spans of the longest stored prefix, alive or not."""
        path: list[Span] = []
        position = 0
        while position < len(tokens):
            for span in self.spans.values():
                if (
                    span.root == root
                    and span.start == position
                    and span.tokens[: position + 1] == tokens[: position + 1]
                ):
                    break
            else:
                break
            path.append(span)
            shared = position
            while shared < min(span.end, len(tokens)) and span.tokens[shared] == tokens[shared]:
                shared += 1
            if shared < span.end:
                # It is left in its middle; another may start there.
                position = shared
                continue
            position = span.end
        return path

    def covered(self, path: list[Span], tokens: Tokens) -> int:
        best = 0
        for span in path:
            while best < min(span.end, len(tokens)) and span.tokens[best] == tokens[best]:
                best += 1
        return best

    def ends(self, span: Span) -> float:
        return max(span.expires, self.pinned_until(span.node))

    def pinned_until(self, node: bytes) -> float:
        return max((until for (end, _), until in self.pins.items() if node in self.path(end)), default=0.0)

    def path(self, node: bytes) -> list[bytes]:
        found = []
        while node in self.spans:
            found.append(node)
            node = self.spans[node].parent
        return found

    def lookup(self, root: Root, tokens: Tokens) -> int:
        path = self.walk(root, tokens)
        alive = []
        for span in path:
            if self.ends(span) <= self.now:
                break
            alive.append(span)
        if alive:
            self.pending[alive[-1].node] = self.now
        if len(alive) < len(path):
            return path[len(alive)].start
        return self.covered(path, tokens)

    def charged(self) -> int:
        return sum(span.size for span in self.spans.values())

    def is_leaf(self, node: bytes) -> bool:
        return all(span.parent != node for span in self.spans.values())

    def orphans(self) -> set[bytes]:
        return {node for node, span in self.spans.items() if span.parent and span.parent not in self.spans}

    def lost(self) -> set[bytes]:
        """Return orphans and all that stands on them."""
        return {node for node in self.spans if self.spans[self.path(node)[-1]].parent}

    # Changing

    def rank(self, span: Span) -> float:
        if self.policy == "cost":
            return self.inflation + span.compute_s / span.size
        return {"lru": span.used, "fifo": span.created, "ttl": 0.0}[self.policy]

    def flush(self) -> None:
        for end, used in sorted(self.pending.items(), key=lambda item: -item[1]):
            for node in self.path(end):
                span = self.spans[node]
                if used >= span.used + COARSE_S:
                    span.used = used
                    span.priority = self.rank(span)
        self.pending.clear()

    def drop_pins(self) -> None:
        self.pins = {key: until for key, until in self.pins.items() if until > self.now}

    def extend(self, node: bytes, expires: float) -> None:
        for each in self.path(node):
            self.spans[each].expires = max(self.spans[each].expires, expires)

    def put(self, root: Root, tokens: Tokens, ttl: float | None, compute_s: float, logits_at: list[int]) -> None:
        """Store a prompt."""
        ttl = self.ttls.get(root.namespace) if ttl is None else ttl
        expires = math.inf if ttl is None else self.now + ttl
        self.flush()
        begun = self.charged()
        protected = set()
        path = self.walk(root, tokens)
        while True:
            protected |= {span.node for span in path}
            start = self.covered(path, tokens)
            if start == len(tokens):
                break
            end = min(len(tokens), (start // self.chunk + 1) * self.chunk)
            hasher = PrefixHasher(root.digest, pack_tokens(tokens))
            child_hash = hasher.at(start)
            node = node_id(child_hash, pack_tokens(tokens[start:end]))
            parent = path[-1].node if path else b""
            span = Span(node, root, tokens[:end], start, parent, 0, compute_s, self.now, self.now, expires)
            span.size = size_of(span, child_hash)
            span.priority = self.rank(span)
            self.spans[node] = span
            self.extend(node, expires)
            for other in self.spans.values():  # what has lost its parent may stand on the new one
                gone = other.parent not in self.spans or other.parent == node
                stands = (
                    other.root == root and other.start > start and other.tokens[: other.start] == tokens[: other.start]
                )
                if not (gone and other.parent and stands and other.start <= end and other.node != node):
                    continue
                if other.start == end or other.tokens[other.start] != tokens[other.start]:
                    other.parent = node
                    self.extend(node, other.expires)
            path = self.walk(root, tokens)
        if path:
            self.extend(path[-1].node, expires)
        for position in logits_at:
            key = (root, tokens[:position])
            if key not in self.logits:
                owner = self.walk(root, tokens[:position])[-1].node
                self.logits[key] = owner
                self.spans[owner].size += item(32, 16 + 32 + len(LOGITS_BLOB))
        self.keep_quota(protected, begun)

    def keep_quota(self, protected: set[bytes], begun: int | None = None) -> None:
        if not self.quota or self.charged() <= self.quota:
            return
        self.drop_pins()
        kept = sum(span.size for node, span in self.spans.items() if node in protected or self.pinned_until(node))
        if kept > self.quota:
            raise TooLarge
        grown = 0 if begun is None else self.charged() - begun
        goal = min(int(0.95 * self.quota), max(int(0.8 * self.quota), self.quota - 2 * grown))
        self.evict(self.quota, goal, protected)
        if self.charged() > self.quota:
            raise TooLarge

    def evict(self, enough: int, goal: int, protected: set[bytes]) -> tuple[int, int]:
        self.drop_pins()
        expired = evicted = spare = 0
        while self.charged() > goal and (self.charged() > enough or spare < SPARE_NODES):
            leaves = [span for node, span in self.spans.items() if node not in protected and self.is_leaf(node)]
            dead = [span for span in leaves if self.ends(span) <= self.now]
            idle = [span for span in leaves if not self.pinned_until(span.node)]
            if dead:
                victim = min(dead, key=lambda span: (self.ends(span), span.node))
                expired += 1
            elif idle and self.policy != "ttl":
                victim = min(idle, key=lambda span: (span.priority, span.node))
                evicted += 1
                if self.policy == "cost":
                    self.inflation = max(self.inflation, victim.priority)
            else:
                break
            spare += self.charged() <= enough
            self.remove(victim.node)
        return expired, evicted

    def remove(self, node: bytes) -> None:
        span = self.spans.pop(node)
        for key in [key for key, owner in self.logits.items() if owner == node]:
            del self.logits[key]
        parent = self.spans.get(span.parent)
        if parent is not None:
            parent.used = max(parent.used, span.used)
            if self.policy == "lru":
                parent.priority = parent.used

    def collect(self, target: int | None) -> tuple[int, int, int]:
        """Return how many spans had expired, were lost, and were evicted."""
        self.flush()
        self.drop_pins()
        self.pins = {key: until for key, until in self.pins.items() if key[0] in self.spans}
        expired = 0
        while dead := [n for n, span in self.spans.items() if self.is_leaf(n) and self.ends(span) <= self.now]:
            for node in dead:
                self.remove(node)
                expired += 1
        lost = self.lost()
        for node in sorted(lost, key=lambda node: -self.spans[node].start):
            self.remove(node)
        evicted = self.evict(target, target, set())[1] if target is not None else 0
        self.pins = {key: until for key, until in self.pins.items() if key[0] in self.spans}
        return expired, len(lost), evicted


def item(key_bytes: int, value_bytes: int) -> int:
    """Return what FORMAT.md charges for a key and a value."""
    if key_bytes + value_bytes <= 2030:
        return key_bytes + value_bytes
    return key_bytes + math.ceil((value_bytes + 16) / 4096) * 4096


def size_of(span: Span, child_hash: bytes) -> int:
    """Return what a span is charged that was stored just now."""
    tokens = pack_tokens(span.tokens[span.start :])
    blob = payload(span.tokens, span.start, span.end, span.compute_s).blobs["tokens"]
    entries = {"tokens": BlobEntry(len(blob), checksum(b"", blob))}
    record = NodeRecord(
        span.root, span.parent, child_hash, span.start, tokens, (), entries, span.created, span.compute_s, {}
    )
    total = 256 + item(32, len(record.pack(span.node))) + item(36, 32 + len(tokens))
    return total + item(32 + len("tokens"), len(blob))
