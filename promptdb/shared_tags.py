"""Tags in the shared store: which prompts have a name, so that those of a name can be fetched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from promptdb.errors import CorruptDataError, NodeNotFoundError
from promptdb.far import joined
from promptdb.far_index import TAGS, root_part
from promptdb.format import pack_record, unpack_record
from promptdb.hashing import FieldHasher
from promptdb.intake import MAX_PROMPT_TOKENS
from promptdb.keys import DIGEST_BYTES, TOKEN_BYTES, PrefixHasher, num_tokens
from promptdb.outgoing import prefix_of
from promptdb.shared import Tier

_PAGE = 100


@dataclass(frozen=True)
class Tagged:
    """A prompt with a tag: digest of its root, and packed tokens up to the end of its last stored span."""

    root_digest: bytes
    packed: bytes


def tags_prefix(name: str) -> str:
    """Return what keys of a tag begin with: nobody sees names in keys."""
    hasher = FieldHasher("promptdb tag")
    hasher.field("name", name)
    return f"{TAGS}{hasher.digest().hex()}/"


def _key(name: str, tagged: Tagged) -> str:
    digest = PrefixHasher(tagged.root_digest, tagged.packed).at(num_tokens(tagged.packed))
    return f"{tags_prefix(name)}{root_part(tagged.root_digest)}{digest.hex()}"


def _record_key(key: str) -> bytes:
    return bytes.fromhex(key.rpartition("/")[2])


def _message(key: str, name: str) -> bytes:
    return f"{key}\0{name}".encode()


def send_tags(tier: Tier, name: str) -> int:
    """Let the shared store know which prompts of the local one have a tag; return how many have.

    Raises
    ------
    SharedError
        The far side fails. Send them again.
    """
    db, signer = tier.db, tier.pusher.signer
    items: dict[str, bytes] = {}
    for label in db.tags(name):
        try:
            record, packed = prefix_of(db, label.node)
        except (NodeNotFoundError, CorruptDataError):
            continue
        tagged = Tagged(record.root.digest, packed)
        key = _key(name, tagged)
        fields: dict[str, object] = {"name": name, "root": tagged.root_digest, "tokens": packed}
        if signer is not None:
            fields |= {"signer": signer.public_key, "signature": signer.sign(_message(key, name))}
        items[key] = pack_record(_record_key(key), fields)
    pages = iter(items.items())
    while page := list(islice(pages, _PAGE)):
        tier.calls.write(lambda far, page=page: far.put(page))  # type: ignore[misc]
    return len(items)


def fetch_tags(tier: Tier, name: str, deadline_s: float) -> Iterator[Tagged]:
    """Yield the prompts that have a tag in the shared store; what does not hold is counted as rejected.

    Raises
    ------
    SharedError
        The far side fails.
    """
    prefix, trust = tags_prefix(name), tier.puller.trust
    keys = iter(tier.calls.read(lambda far: sorted(far.list(prefix)), wait_s=deadline_s))
    while page := list(islice(keys, _PAGE)):
        for key, pieces in zip(page, tier.calls.read(lambda far, page=page: far.get(page)), strict=True):  # type: ignore[misc]
            if pieces is None:
                continue
            try:
                fields = unpack_record(_record_key(key), joined(pieces))
                tagged = _checked(key, name, fields.get("root"), fields.get("tokens"))
                signed = fields.get("signer", b""), fields.get("signature", b"")
                if trust is not None and not trust.holds(_message(key, name), *signed):
                    raise CorruptDataError("a tag that nobody trusted has signed")
            except (CorruptDataError, ValueError, TypeError):
                tier.calls.counts.rejected += 1
                continue
            yield tagged


def _checked(key: str, name: str, root_digest: object, packed: object) -> Tagged:
    """Return a tag that can be: its key follows from all that it says."""
    if (
        type(root_digest) is bytes
        and type(packed) is bytes
        and len(root_digest) == DIGEST_BYTES
        and 0 < len(packed) <= MAX_PROMPT_TOKENS * TOKEN_BYTES
        and len(packed) % TOKEN_BYTES == 0
        and _key(name, tagged := Tagged(root_digest, packed)) == key
    ):
        return tagged
    raise CorruptDataError("a tag of another prompt than its key says")
