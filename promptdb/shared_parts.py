"""Parts of what lies in the shared store: all of some roots, what continues a span, or the prompts of a tag."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from promptdb.errors import CorruptDataError
from promptdb.far import joined
from promptdb.far_index import LOGITS_ENTRIES, ROOTS, SPANS, Entry, root_part
from promptdb.format import unpack_root
from promptdb.keys import DIGEST_BYTES, TOKEN_BYTES, PrefixHasher, Root, common_prefix, node_id, num_tokens
from promptdb.outgoing import prefix_of
from promptdb.pulling import Item, Want
from promptdb.shared import Tier
from promptdb.shared_tags import Tagged, fetch_tags

_LIST_KEYS = 1000
_PROMPTS = 64
_HASH_DIGITS = 2 * DIGEST_BYTES
# Of listing all keys; each operation has its own timeouts besides.
LIST_S = 600.0

Part = Iterator[tuple[str, Entry]]


def roots(tier: Tier) -> list[Root]:
    """Return the roots that the shared store has spans of."""
    keys = sorted(tier.calls.read(lambda far: list(far.list(ROOTS)), wait_s=LIST_S))
    found = []
    for key, pieces in zip(keys, tier.calls.read(lambda far: far.get(keys)), strict=True):
        if pieces is None:
            continue
        try:
            digest = bytes.fromhex(key.removeprefix(ROOTS))
            root, _ = unpack_root(digest, joined(pieces))
        except (ValueError, CorruptDataError):
            tier.calls.counts.rejected += 1
            continue
        if root.digest == digest:
            found.append(root)
        else:
            tier.calls.counts.rejected += 1
    return found


def of_roots(tier: Tier, wants: Callable[[Root], bool]) -> Part:
    """Yield all entries of the roots that are wanted."""
    for root in roots(tier):
        if wants(root):
            for prefix in (SPANS, LOGITS_ENTRIES):
                yield from _entries(tier, _listed(tier, prefix, root))


def _listed(tier: Tier, prefix: str, root: Root) -> list[str]:
    start = f"{prefix}{root_part(root.digest)}/"
    return tier.calls.read(lambda far: list(far.list(start)), wait_s=LIST_S)


def _entries(tier: Tier, keys: Sequence[str]) -> Part:
    """Yield (key, entry) of those that are there and hold."""
    waiting = iter(keys)
    while page := list(islice(waiting, _LIST_KEYS)):
        yield from tier.puller.entries(page, tier.calls.read(lambda far, page=page: far.get(page))).items()  # type: ignore[misc]


def below(tier: Tier, node: bytes) -> Part:
    """Yield the entries of all that continues a span of the local store, and of itself.

    Raises
    ------
    NodeNotFoundError
        The local store has no such span, or not what it stands on.
    SharedError
        The far side fails.

    Notes
    -----
    Lists all keys of the span's root, and fetches only entries that may belong to it, level by level: a digest and a
    look into the list for each position.
    """
    record, packed = prefix_of(tier.db, node)
    root = record.root
    by_hash: dict[str, list[str]] = defaultdict(list)
    for key in _listed(tier, SPANS, root):
        by_hash[key.rpartition("/")[2][:_HASH_DIGITS]].append(key)
    logits = {key.rpartition("/")[2]: key for key in _listed(tier, LOGITS_ENTRIES, root)}
    chosen: list[str] = []
    # Packed tokens up to the end of a span, and the position from which on others may continue it.
    level = [(packed, 0)]
    while level:
        places: dict[str, tuple[bytes, int, bytes]] = {}
        for tokens, start in level:
            hasher = PrefixHasher(root.digest, tokens)
            for position in range(start, num_tokens(tokens) + 1):
                digest = hasher.at(position)
                if position > record.start and digest.hex() in logits:
                    chosen.append(logits.pop(digest.hex()))
                for key in by_hash.pop(digest.hex(), ()):
                    places[key] = tokens, position, digest
        level = []
        for key, entry in _entries(tier, list(places)):
            tokens, position, digest = places[key]
            if entry.start != position or entry.node != node_id(digest, entry.span):
                continue
            # Of what begins before the span, only what goes through it: what parts earlier is no part of it.
            shared = common_prefix(entry.span, tokens[position * TOKEN_BYTES :])
            if position + shared > record.start:
                yield key, entry
                level.append((tokens[: position * TOKEN_BYTES] + entry.span, position + shared + 1))
    yield from _entries(tier, chosen)


def tagged(tier: Tier, name: str, wants: Callable[[Root], bool]) -> tuple[list[tuple[Root, Tagged]], list[Item]]:
    """Return the prompts of some roots that have a tag in the shared store, and what there is to fetch of them.

    Raises
    ------
    SharedError
        The far side fails.
    """
    known = {root.digest: root for root in roots(tier) if wants(root)}
    found = [(known[each.root_digest], each) for each in fetch_tags(tier, name, LIST_S) if each.root_digest in known]
    items: dict[str, Item] = {}
    by_root: dict[Root, list[Tagged]] = defaultdict(list)
    for root, each in found:
        by_root[root].append(each)
    for root, prompts in by_root.items():
        waiting = iter(prompts)
        while page := list(islice(waiting, _PROMPTS)):
            with tier.db.read() as snapshot:
                matches = [snapshot.match(root, each.packed) for each in page]
            lacking = [
                Want(match.packed, (), match.num_tokens, match.has_logits) for match in matches if not match.is_complete
            ]
            items |= {item.key: item for item in tier.puller.find(root, lacking) if item.key not in items}
    return found, list(items.values())
