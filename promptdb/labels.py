"""Pins and tags as they are stored: names for prompts, each with an end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from promptdb.errors import CorruptDataError, InputTypeError, StoreError
from promptdb.format import LABELS, pack_record, unpack_record
from promptdb.keys import DIGEST_BYTES
from promptdb.life import NEVER
from promptdb.tables import Reader, Writer

PIN, TAG = "pin", "tag"
KINDS = {PIN: b"p", TAG: b"t"}
LONGEST_NAME_BYTES = 400


@dataclass(frozen=True)
class Label:
    """A pin or a tag: of the path from the start of a prompt to the end of a stored span.

    Attributes
    ----------
    kind : ``"pin"``: the path is not evicted; or ``"tag"``: a name to find it by.
    node : ID of the path's last span.
    name : of a pin it may be empty.
    num_tokens : length of the path up to the end of the span.
    created_unix_s, expires_unix_s : from when to when it holds; a tag may never expire.
    """

    kind: str
    node: bytes
    name: str
    num_tokens: int
    created_unix_s: float
    expires_unix_s: float

    @property
    def key(self) -> bytes:
        """Where it stands in the table."""
        return label_key(self.kind, self.node, self.name)

    def write(self, writer: Writer) -> None:
        """Store it, in place of one of the same kind, name and span."""
        fields = {
            "num_tokens": self.num_tokens,
            "created_unix_s": self.created_unix_s,
            "expires_unix_s": self.expires_unix_s,
        }
        writer.put(LABELS, self.key, pack_record(self.key, fields))


def label_key(kind: str, node: bytes, name: str) -> bytes:
    """Return the key of a label."""
    return KINDS[kind] + node + name.encode()


def check_name(name: str, *, may_be_empty: bool) -> None:
    """Raise what is wrong with the name of a label: not text, empty, or too long."""
    if not isinstance(name, str):
        raise InputTypeError(f"a name must be a str, not {type(name).__name__}")
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise StoreError(f"the name is not valid Unicode: {error}") from error
    if length > LONGEST_NAME_BYTES or not (name or may_be_empty) or not (name.isprintable() or not name):
        what = "is empty" if not name else f"{name[:40]!r} has {length} bytes or characters that cannot be printed"
        raise StoreError(f"the name {what}", f"choose 1 to {LONGEST_NAME_BYTES} bytes of printable text")


def read_labels(reader: Reader, kind: str, node: bytes = b"") -> Iterator[Label]:
    """Yield the labels of a kind, expired ones too, in the order of their spans; only those of ``node`` if it is given.

    Raises
    ------
    CorruptDataError
        A record does not hold.
    """
    start = KINDS[kind] + node
    for key, data in reader.scan(LABELS, prefix=start):
        yield unpack_label(key, data)


def unpack_label(key: bytes, data: memoryview) -> Label:
    """Read the label under a key; raises :class:`CorruptDataError`."""
    fields = unpack_record(key, data)
    kind, node = {start: kind for kind, start in KINDS.items()}.get(key[:1], ""), key[1 : 1 + DIGEST_BYTES]
    try:
        name = key[1 + DIGEST_BYTES :].decode()
        label = Label(kind, node, name, fields["num_tokens"], fields["created_unix_s"], fields["expires_unix_s"])
    except (KeyError, UnicodeDecodeError) as error:
        raise CorruptDataError(f"a label lacks or garbles a field: {error!r}", "`promptdb verify --fix`") from error
    is_sound = type(label.num_tokens) is int and type(label.created_unix_s) is type(label.expires_unix_s) is float
    if not kind or len(node) != DIGEST_BYTES or not is_sound or not label.expires_unix_s >= 0:
        raise CorruptDataError("a label has a field that cannot be", "`promptdb verify --fix`")
    return label


def next_pin_end(reader: Reader) -> float:
    """Return when the first of all pins ends; infinite if there is none. Reads them all."""
    return min((label.expires_unix_s for label in read_labels(reader, PIN)), default=NEVER)
