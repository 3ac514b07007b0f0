"""Records: checksums that know their key, fields that cannot be, and bytes that are fixed."""

import contextlib
import dataclasses

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128

from promptdb.errors import CorruptDataError
from promptdb.format import (
    BlobEntry,
    Group,
    NodeRecord,
    checksum,
    pack_record,
    pack_root,
    unpack_record,
    unpack_root,
)
from promptdb.keys import Root, pack_tokens

KEY = bytes(range(32))
RECORD = NodeRecord(
    root=Root("aa" * 32, "bb" * 32, "tenant", "hooks"),
    parent=bytes(32),
    child_hash=b"\x01" * 32,
    start=256,
    span=pack_tokens([1, 2**32 - 1]),
    layout=(Group((0, 1, 2, 3), 2, 64, "BF16"), Group((4, 5), 1, 128, "F32")),
    blobs={"kv": BlobEntry(4096, b"\x02" * 16), "lp": BlobEntry(8, b"\x03" * 16)},
    created_unix_s=1.5,
    compute_s=0.25,
    provenance={"torch": "2.13", "batch": 4, "scale": 0.5},
)
# Old stores are read by these bytes: if this fails, FORMAT_VERSION has to rise.
GOLDEN_RECORD = (
    "62022a5b697c84bca128f975c67e326e8aa4726f6f7484aa776569676874735f6964d9406161616161616161616161616161"
    "6161616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161616161"
    "ac746f6b656e697a65725f6964d9406262626262626262626262626262626262626262626262626262626262626262626262"
    "6262626262626262626262626262626262626262626262626262626262a96e616d657370616365a674656e616e74af696e74"
    "657276656e74696f6e5f6964a5686f6f6b73a6706172656e74c4200000000000000000000000000000000000000000000000"
    "000000000000000000aa6368696c645f68617368c42001010101010101010101010101010101010101010101010101010101"
    "01010101a57374617274cd0100a6746f6b656e73c40801000000ffffffffa66c61796f7574929494000102030240a4424631"
    "369492040501cc80a3463332a5626c6f627382a26b7692cd1000c41002020202020202020202020202020202a26c709208c4"
    "1003030303030303030303030303030303ae637265617465645f756e69785f73cb3ff8000000000000a9636f6d707574655f"
    "73cb3fd0000000000000aa70726f76656e616e636583a5746f726368a4322e3133a5626174636804a57363616c65cb3fe000"
    "0000000000"
)


def resealed(fields, key=KEY):
    return pack_record(key, fields)


def fields_of(record=RECORD):
    return msgpack.unpackb(record.pack(KEY)[16:])


def test_record_bytes_are_fixed():
    assert RECORD.pack(KEY).hex() == GOLDEN_RECORD
    assert NodeRecord.unpack(KEY, bytes.fromhex(GOLDEN_RECORD)) == RECORD
    assert NodeRecord.unpack(KEY, memoryview(bytes.fromhex(GOLDEN_RECORD))) == RECORD


def test_record_says_its_sizes():
    assert (RECORD.num_tokens, RECORD.end, RECORD.size_bytes) == (2, 258, 4104)
    assert RECORD.layout[0].span_shape(7) == (4, 2, 7, 64)


@given(st.binary(min_size=1, max_size=40), st.binary(max_size=100))
def test_checksum_is_xxh3_seeded_with_the_key(key, content):
    seed = sum(byte << (8 * i) for i, byte in enumerate(key[:8]))
    assert checksum(key, content) == xxh3_128(content, seed=seed).digest()
    assert checksum(key, memoryview(content)) == checksum(key, bytearray(content))


def test_every_flipped_bit_and_every_cut_is_noticed():
    data = RECORD.pack(KEY)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptDataError):
            NodeRecord.unpack(KEY, bytes(flipped))
    for size in range(len(data)):
        with pytest.raises(CorruptDataError):
            NodeRecord.unpack(KEY, data[:size])
    with pytest.raises(CorruptDataError):
        NodeRecord.unpack(KEY, data + b"\0")


def test_record_under_another_key_is_refused():
    with pytest.raises(CorruptDataError, match="checksum"):
        NodeRecord.unpack(b"\x07" + KEY[1:], RECORD.pack(KEY))


def test_unknown_fields_are_ignored():
    assert NodeRecord.unpack(KEY, resealed({**fields_of(), "later": [1, 2]})) == RECORD


@pytest.mark.parametrize("name", [name for name in NodeRecord._fields if name != "span"] + ["tokens"])
def test_missing_fields_are_refused(name):
    fields = fields_of()
    del fields[name]
    with pytest.raises(CorruptDataError, match=name):
        NodeRecord.unpack(KEY, resealed(fields))


@pytest.mark.parametrize(
    "change",
    [
        {"root": None},
        {"root": {"weights_id": 1, "tokenizer_id": "", "namespace": "", "intervention_id": ""}},
        {"root": {"weights_id": ""}},
        {"parent": "text"},
        {"parent": bytes(31)},
        {"child_hash": bytes(31)},
        {"child_hash": b""},
        {"start": -1},
        {"start": 1.0},
        {"start": True},
        {"start": None},
        {"tokens": b""},
        {"tokens": bytes(5)},
        {"tokens": "abcd"},
        {"tokens": [1, 2]},
        {"layout": 7},
        {"layout": [[1, 2]]},
        {"layout": [[[0, 1], 1, -1, "F32"]]},
        {"layout": [[["a"], 1, 1, "F32"]]},
        {"layout": [[[0, 1], 1, 1, 32]]},
        {"blobs": []},
        {"blobs": {"kv": 3}},
        {"blobs": {"kv": [-1, bytes(16)]}},
        {"blobs": {"kv": [1, bytes(15)]}},
        {"blobs": {"kv": [1, "x" * 16]}},
        {"created_unix_s": "now"},
        {"compute_s": None},
        {"provenance": []},
    ],
    ids=str,
)
def test_fields_that_cannot_be_are_refused(change):
    with pytest.raises(CorruptDataError):
        NodeRecord.unpack(KEY, resealed({**fields_of(), **change}))


@given(st.binary(max_size=200))
def test_any_sealed_bytes_are_a_record_or_corrupt(body):
    sealed = checksum(KEY, body) + body
    for read in (unpack_record, unpack_root, NodeRecord.unpack):
        with contextlib.suppress(CorruptDataError):
            read(KEY, sealed)


JSON_LIKE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(fields_of())), JSON_LIKE, min_size=1))
def test_any_field_is_read_or_corrupt(change):
    with contextlib.suppress(CorruptDataError):
        NodeRecord.unpack(KEY, resealed({**fields_of(), **change}))


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1 items
        b"\xdf\xff\xff\xff\xff",  # a map of as many
        b"\xc6\xff\xff\xff\xff",  # bytes of as many
        b"\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\x91" * 5000,  # deep
        b"\x81\xa1a" * 5000,
        b"\x81\x90\x01",  # a key that is a list
        b"\x80\x80",  # two objects
        b"\xc7\x00\x05",
        b"\xd6\xff\x00\x00\x00\x00",
        b"\xa1\xff",  # not UTF-8
    ],
    ids=lambda body: body[:6].hex(),
)
def test_hostile_msgpack_is_refused(body):
    with pytest.raises(CorruptDataError):
        unpack_record(KEY, checksum(KEY, body) + body)


def test_root_records():
    root, totals = Root("a", "b"), {"num_nodes": 1, "num_tokens": 2, "blob_bytes": 3}
    assert unpack_root(root.digest, pack_root(root, totals)) == (root, totals)
    for bad in (
        {},
        {"root": {}, "totals": totals},
        {"root": dataclasses.asdict(root), "totals": {}},
        {"root": dataclasses.asdict(root), "totals": {**totals, "num_nodes": -1}},
        {"root": dataclasses.asdict(root), "totals": {**totals, "num_nodes": "1"}},
        {"root": dataclasses.asdict(root), "totals": None},
    ):
        with pytest.raises(CorruptDataError):
            unpack_root(KEY, pack_record(KEY, bad))
