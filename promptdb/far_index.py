"""Keys and index entries of the shared store, and the walk that finds the longest prefix of a prompt from afar. Pure.

==================================  ===========================================================================
``i/<root>/<prefix><token>``        entry of the span that goes on after a prefix with a token
``l/<root>/<prefix>``               entry of the logits after a prefix, where no span's value has them
``v/<digest>``                      value: an archive with one span (:mod:`promptdb.parcel`)
``r/<root>``                        record of a root, as in the table ``roots``
``t/<tag>/<root><prefix>``          prompt that has a tag (:mod:`promptdb.shared_tags`)
``c/<root>/<prefix>``               lease: somebody computes the tokens up to the end of a prefix
==================================  ===========================================================================

``<root>`` is the first 16 bytes of the root digest in hex, ``<prefix>`` a prefix digest, ``<token>`` as in a child key:
both follow from the prompt's own tokens. FORMAT.md specifies the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from promptdb.errors import CorruptDataError
from promptdb.format import pack_record, unpack_record
from promptdb.intake import MAX_PROMPT_TOKENS
from promptdb.keys import DIGEST_BYTES, TOKEN_BYTES, PrefixHasher, Root, child_key, common_prefix, node_id, num_tokens
from promptdb.opening import MAX_CHUNK_TOKENS

SPANS, LOGITS_ENTRIES, VALUES, ROOTS, LEASES, TAGS = "i/", "l/", "v/", "r/", "c/", "t/"
MAX_VALUE_BYTES = 4 << 30


def root_part(root_digest: bytes) -> str:
    """Return what stands for a root in keys."""
    return root_digest[: DIGEST_BYTES // 2].hex()


def span_key(root_digest: bytes, child_hash: bytes, following: bytes) -> str:
    """Return the key of the entry of the span that goes on after a prefix with packed tokens ``following``."""
    return f"{SPANS}{root_part(root_digest)}/{child_key(child_hash, following[:TOKEN_BYTES]).hex()}"


def logits_key(root_digest: bytes, prefix_digest: bytes) -> str:
    """Return the key of the entry of the logits after a prefix."""
    return f"{LOGITS_ENTRIES}{root_part(root_digest)}/{prefix_digest.hex()}"


def value_key(digest: bytes) -> str:
    """Return the key of a value."""
    return VALUES + digest.hex()


def lease_key(root_digest: bytes, prefix_digest: bytes) -> str:
    """Return the key that whoever computes the last tokens of a prefix holds."""
    return f"{LEASES}{root_part(root_digest)}/{prefix_digest.hex()}"


def root_key(root: Root) -> str:
    """Return the key of a root's record."""
    return ROOTS + root.digest.hex()


@dataclass(frozen=True)
class Entry:
    """What the index says of a span. Not to be believed: the value tells.

    Attributes
    ----------
    node : ID of the span.
    start : its first position.
    span : its packed tokens.
    logits : positions after which its value has logits.
    value : digest of the value; ``size_bytes`` its size.
    public_key, signature : of whoever wrote it; empty if it is not signed.
    """

    node: bytes
    start: int
    span: bytes
    logits: tuple[int, ...]
    value: bytes
    size_bytes: int
    public_key: bytes = b""
    signature: bytes = b""

    @property
    def num_tokens(self) -> int:
        """Length of the span in tokens."""
        return num_tokens(self.span)

    def message(self, key: str) -> bytes:
        """Return what is signed: where the entry stands, which span it is, and which bytes are its value."""
        return b"".join((key.encode(), b"\0", self.node, self.value, self.size_bytes.to_bytes(8, "little")))

    def pack(self, key: str) -> bytes:
        """Return the entry's bytes, to stand under a key."""
        fields = {
            "node": self.node,
            "start": self.start,
            "tokens": self.span,
            "logits": list(self.logits),
            "value": self.value,
            "size": self.size_bytes,
        }
        if self.signature:
            fields |= {"signer": self.public_key, "signature": self.signature}
        return pack_record(_record_key(key), fields)

    @classmethod
    def unpack(cls, key: str, data: bytes) -> Entry:
        """Read an entry; raises :class:`CorruptDataError`. Unknown fields are ignored."""
        fields = unpack_record(_record_key(key), data)
        entry = cls(
            fields.get("node", b""),
            fields.get("start", -1),
            fields.get("tokens", b""),
            tuple(fields["logits"]) if type(fields.get("logits")) is list else (-1,),
            fields.get("value", b""),
            fields.get("size", -1),
            fields.get("signer", b""),
            fields.get("signature", b""),
        )
        if not entry._is_sound():
            raise CorruptDataError("an entry of the shared index with a field that cannot be")
        return entry

    def _is_sound(self) -> bool:
        texts = (self.node, self.span, self.value, self.public_key, self.signature)
        return (
            all(type(each) is bytes for each in texts)
            and len(self.node) == len(self.value) == DIGEST_BYTES
            and 0 < len(self.span) <= MAX_CHUNK_TOKENS * TOKEN_BYTES
            and len(self.span) % TOKEN_BYTES == 0
            and type(self.start) is int
            and 0 <= self.start <= MAX_PROMPT_TOKENS
            and type(self.size_bytes) is int
            and 0 < self.size_bytes <= MAX_VALUE_BYTES
            and all(type(at) is int and self.start < at <= self.start + self.num_tokens for at in self.logits)
        )


def _record_key(key: str) -> bytes:
    """Return the key that an entry's checksum is made with: the end of its own, which differs most."""
    return bytes.fromhex(key.rpartition("/")[2])


@dataclass(frozen=True)
class FarStep:
    """Use of the first tokens of a span that lies afar: it covers prompt positions ``[start, end)``."""

    key: str
    entry: Entry  # its node ID is that of its tokens after the prompt's
    start: int
    end: int


class Walk:
    """Finds which far spans cover a prompt beyond what is stored here. Not thread safe.

    Parameters
    ----------
    start : ``[0, start)`` is stored here.
    boundaries : positions where spans may begin besides multiples of ``chunk_tokens``.

    Notes
    -----
    All positions that can be guessed are asked for at once; where a span ended elsewhere, the walk goes on from there.
    """

    def __init__(self, root: Root, packed: bytes, start: int, boundaries: Sequence[int], chunk_tokens: int) -> None:
        self.root, self.packed, self.start = root, packed, start
        self.total = num_tokens(packed)
        self.reach = start
        self.steps: list[FarStep] = []
        multiples = range(0, self.total, chunk_tokens)
        guesses = {start, *multiples, *boundaries}
        hasher = PrefixHasher(root.digest, packed)
        keys = {at: self._key(hasher.at(at), at) for at in sorted(guesses) if at < self.total}
        # A span that began before what is stored here may go on behind it.
        ordered = [at for at in keys if at >= max(0, start - chunk_tokens)]
        self.ancestors = [key for at, (key, _) in keys.items() if at < start]
        self._keys = keys
        self._waiting = ordered
        self._asked: set[int] = set()
        self._found: dict[int, tuple[str, Entry]] = {}

    def _key(self, digest: bytes, at: int) -> tuple[str, bytes]:
        return span_key(self.root.digest, digest, self.packed[at * TOKEN_BYTES : (at + 1) * TOKEN_BYTES]), digest

    def ask(self, most: int) -> list[str]:
        """Return the keys to ask for next, ``most`` or fewer; none: the walk is over."""
        if self.reach >= self.total or self.reach in self._asked:
            return []
        if self.reach not in self._keys:
            self._keys[self.reach] = self._key(PrefixHasher(self.root.digest, self.packed).at(self.reach), self.reach)
            self._waiting = sorted({*self._waiting, self.reach})
        if self._asked:
            self._waiting = [at for at in self._waiting if at >= self.reach]
        chosen, self._waiting = self._waiting[:most], self._waiting[most:]
        self._asked.update(chosen)
        return [self._keys[at][0] for at in chosen]

    def take(self, entries: Mapping[str, Entry]) -> None:
        """Take what was found under the keys."""
        for at in self._asked:
            key, digest = self._keys[at]
            entry = entries.get(key)
            if entry is not None and (entry.start, entry.node) == (at, node_id(digest, entry.span)):
                self._found[at] = key, entry
        self._advance()

    def _advance(self) -> None:
        self.reach, self.steps = self.start, []
        for at in sorted(self._found):
            if at > self.reach:
                return
            key, entry = self._found[at]
            end = at + common_prefix(entry.span, self.packed[at * TOKEN_BYTES :])
            if end > self.reach:
                self.steps.append(FarStep(key, entry, at, end))
                self.reach = end
