"""Blobs against the safetensors library, and against headers that lie."""

import json
import math
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptdb.blobs import DTYPE_BYTES, MAX_HEADER_BYTES, TensorSpec, build_blob, parse_blob, plan_blob
from promptdb.errors import CorruptDataError

safetensors = pytest.importorskip("safetensors")
torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64,
}  # fmt: skip

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
NAMES = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")


@st.composite
def tensors(draw):
    found = []
    for name in draw(st.lists(NAMES, max_size=5, unique=True)):
        spec = TensorSpec(name, draw(st.sampled_from(sorted(DTYPE_BYTES))), draw(SHAPES))
        data = draw(st.binary(min_size=spec.size_bytes, max_size=spec.size_bytes))
        if spec.dtype == "BOOL":
            data = bytes(byte & 1 for byte in data)
        found.append((spec, data))
    return found


def as_dict(blob):
    return {name: (view.dtype, view.shape, bytes(view.data)) for name, view in parse_blob(blob).items()}


@given(
    tensors(),
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=4), st.text(st.characters(codec="utf-8"), max_size=4)
    ),
)
def test_safetensors_reads_what_we_write(content, metadata):
    blob = bytes(build_blob(content, metadata))
    wanted = {spec.name: (spec.dtype, spec.shape, data) for spec, data in content}
    assert as_dict(blob) == wanted
    theirs = {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in safetensors.deserialize(blob)
    }
    assert theirs == wanted


@given(tensors())
def test_torch_loads_what_we_write(content):
    loaded = safetensors_torch.load(bytes(build_blob(content)))
    assert set(loaded) == {spec.name for spec, _ in content}
    for spec, data in content:
        tensor = loaded[spec.name]
        assert (tensor.dtype, tuple(tensor.shape)) == (TORCH_DTYPES[spec.dtype], spec.shape)
        assert bytes(tensor.flatten().contiguous().view(torch.uint8).tolist()) == data


@given(tensors())
def test_we_read_what_safetensors_writes(content):
    data = {
        spec.name: torch.frombuffer(bytearray(raw), dtype=TORCH_DTYPES[spec.dtype]).reshape(spec.shape)
        if raw
        else torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
        for spec, raw in content
    }
    blob = safetensors_torch.save(data, metadata={"format": "pt"})
    assert as_dict(blob) == {spec.name: (spec.dtype, spec.shape, raw) for spec, raw in content}


def test_bytes_are_fixed():
    blob = build_blob([(TensorSpec("a", "U8", (3,)), b"xyz"), (TensorSpec("b", "U16", (1,)), b"12")], {"k": "v"})
    header = b'{"__metadata__":{"k":"v"},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},'
    header += b'"b":{"dtype":"U16","shape":[1],"data_offsets":[3,5]}}'
    padding = -(len(header) + 8 - 48) % 64
    assert blob == struct.pack("<Q", len(header) + padding) + header + b" " * padding + b"xyz12"


@given(tensors())
def test_data_begins_48_bytes_past_a_cache_line(content):
    plan = plan_blob([spec for spec, _ in content])
    assert len(plan.header) % 64 == 48
    assert plan.size_bytes == len(plan.header) + sum(len(data) for _, data in content)
    position = len(plan.header)
    for offset, (_, data) in zip(plan.offsets_bytes, content, strict=True):
        assert offset == position
        position += len(data)


def test_views_are_views():
    blob = build_blob([(TensorSpec("a", "U8", (3,)), b"xyz")])
    view = parse_blob(blob)["a"].data
    blob[-1:] = b"!"
    assert bytes(view) == b"xy!"


def test_writer_refuses_what_readers_would():
    with pytest.raises(ValueError, match="two tensors named 'a'"):
        plan_blob([TensorSpec("a", "U8", (1,)), TensorSpec("a", "U8", (1,))])
    with pytest.raises(ValueError, match="reserved"):
        plan_blob([TensorSpec("__metadata__", "U8", (1,))])
    with pytest.raises(ValueError, match="a: 2 bytes for U8"):
        build_blob([(TensorSpec("a", "U8", (3,)), b"xy")])


@given(st.sampled_from(["F32", "F64", "F16", "BF16"]), st.data())
def test_floats_are_torchs(dtype, data):
    count = data.draw(st.integers(0, 9))
    raw = data.draw(st.binary(min_size=count * DTYPE_BYTES[dtype], max_size=count * DTYPE_BYTES[dtype]))
    found = parse_blob(build_blob([(TensorSpec("t", dtype, (count,)), raw)]))["t"].floats()
    wanted = torch.frombuffer(bytearray(raw), dtype=TORCH_DTYPES[dtype]).double().tolist() if raw else []
    assert len(found) == count
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == theirs or (math.isnan(ours) and math.isnan(theirs))


def test_floats_of_integers_are_refused():
    with pytest.raises(CorruptDataError, match="I32"):
        parse_blob(build_blob([(TensorSpec("t", "I32", (1,)), bytes(4))]))["t"].floats()


# Headers that lie


def sealed(header, data=b"", length=None):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="U8", shape=(4,), offsets=(0, 4), **more):
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": offsets,
        **more,
    }


HOSTILE = {
    "empty": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "header beyond the end": sealed(b"{}", length=3),
    "header of 2**63": sealed(b"{}", length=2**63),
    "header of 2**64 - 1": sealed(b"{}", length=2**64 - 1),
    "header of 2**64 - 8, which wraps around": sealed(b"{}", length=2**64 - 8),
    "header above the limit": sealed(b" " * (MAX_HEADER_BYTES + 1)),
    "not JSON": sealed(b"{]"),
    "not UTF-8": sealed(b'{"\xff":1}'),
    "UTF-16": sealed("{}".encode("utf-16")),
    "byte order mark": sealed(b"\xef\xbb\xbf{}"),
    "a list": sealed([]),
    "a number": sealed(b"1"),
    "deep": sealed(b'{"a":' * 100_000),
    "deep lists": sealed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "long number": sealed(b'{"a":{"dtype":"U8","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,4]}}', bytes(4)),
    "entry is null": sealed({"a": None}),
    "entry is text": sealed({"a": "dtype"}),
    "entry is a list": sealed({"a": [1]}),
    "no dtype": sealed({"a": {"shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
    "no shape": sealed({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, bytes(4)),
    "no offsets": sealed({"a": {"dtype": "U8", "shape": [4]}}, bytes(4)),
    "unknown dtype": sealed({"a": entry("F128")}, bytes(4)),
    "dtype is a number": sealed({"a": entry(4)}, bytes(4)),
    "dtype is a list": sealed({"a": entry(["U8"])}, bytes(4)),
    "dtype in lower case": sealed({"a": entry("u8")}, bytes(4)),
    "wrong dtype": sealed({"a": entry("U16")}, bytes(4)),
    "shape too small": sealed({"a": entry(shape=(3,))}, bytes(4)),
    "negative shape": sealed({"a": entry(shape=(-2, -2))}, bytes(4)),
    "shape of floats": sealed({"a": entry(shape=(4.0,))}, bytes(4)),
    "shape of booleans": sealed({"a": entry(shape=(True, 4))}, bytes(4)),
    "shape is text": sealed({"a": entry("U32", shape="", offsets=[0, 4])}, bytes(4)),
    "shape is a map": sealed({"a": entry("U32", shape={}, offsets=[0, 4])}, bytes(4)),
    "shape overflows": sealed({"a": entry(shape=(2**32, 2**32, 4))}, bytes(4)),
    "shape with 2**63": sealed({"a": entry(shape=(2**63, 0), offsets=[0, 0])}),
    "rank 17": sealed({"a": entry(shape=(1,) * 16 + (4,))}, bytes(4)),
    "negative offset": sealed({"a": entry(offsets=[-4, 0])}, bytes(4)),
    "offsets backwards": sealed({"a": entry(offsets=[4, 0])}, bytes(4)),
    "three offsets": sealed({"a": entry(offsets=[0, 4, 4])}, bytes(4)),
    "offsets of floats": sealed({"a": entry(offsets=[0.0, 4.0])}, bytes(4)),
    "offset beyond the end": sealed({"a": entry(shape=(8,), offsets=[0, 8])}, bytes(4)),
    "a hole at the start": sealed({"a": entry(offsets=[1, 5])}, bytes(5)),
    "a hole in the middle": sealed({"a": entry(), "b": entry(offsets=[5, 9])}, bytes(9)),
    "overlap": sealed({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)),
    "same place": sealed({"a": entry(), "b": entry()}, bytes(4)),
    "bytes after the last tensor": sealed({"a": entry()}, bytes(5)),
    "data without tensors": sealed({}, bytes(1)),
}  # fmt: skip


@pytest.mark.parametrize("blob", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused(blob):
    tracemalloc.start()
    try:
        with pytest.raises(CorruptDataError):
            parse_blob(blob)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * len(blob) + 1_000_000


def test_order_of_entries_is_free():
    blob = sealed({"b": entry(offsets=[4, 8]), "a": entry(offsets=[0, 4])}, b"aaaabbbb")
    assert as_dict(blob) == {"a": ("U8", (4,), b"aaaa"), "b": ("U8", (4,), b"bbbb")}
    assert {name: bytes(part["data"]) for name, part in safetensors.deserialize(blob)} == {"a": b"aaaa", "b": b"bbbb"}


SAMPLE = bytes(
    build_blob(
        [(TensorSpec("kv.0", "F32", (2, 1, 3, 2)), bytes(range(48))), (TensorSpec("x", "I8", ()), b"\x07")], {"k": "v"}
    )
)


def test_every_truncation_is_refused():
    for size in range(len(SAMPLE)):
        with pytest.raises(CorruptDataError):
            parse_blob(SAMPLE[:size])


def test_every_flipped_bit_is_refused_or_read_consistently():
    for bit in range(8 * len(SAMPLE)):
        flipped = bytearray(SAMPLE)
        flipped[bit // 8] ^= 1 << bit % 8
        check_refused_or_consistent(bytes(flipped))


def check_refused_or_consistent(blob):
    try:
        found = parse_blob(blob)
    except CorruptDataError:
        return
    for view in found.values():
        assert len(view.data) == DTYPE_BYTES[view.dtype] * math.prod(view.shape)
    assert sum(len(view.data) for view in found.values()) + 8 + struct.unpack("<Q", blob[:8])[0] == len(blob)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10) | st.floats() | st.sampled_from(["", "U8", "F32", "dtype"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a", "__metadata__"]), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON), st.binary(max_size=8))
@settings(max_examples=300)
def test_any_json_is_refused_or_read_consistently(header, data):
    check_refused_or_consistent(sealed(header, data))


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_read_consistently(blob):
    check_refused_or_consistent(blob)
    check_refused_or_consistent(sealed(blob))
