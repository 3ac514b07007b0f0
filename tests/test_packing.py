"""Compressed blobs: bit for bit what was stored, only where it pays, and of bounded memory whatever they claim."""

import os
import struct
import subprocess
import sys
import tracemalloc

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from promptdb import PromptDB
from promptdb.blobs import DTYPE_BYTES, TensorSpec, build_blob, parse_blob
from promptdb.commits import SpanPayload
from promptdb.errors import CorruptDataError, FormatVersionError, InputTypeError, MissingLibraryError, StoreError
from promptdb.format import BLOBS, LOGITS, META, STORE_KEY, Group, pack_record, unpack_record
from promptdb.keys import Root, pack_tokens
from promptdb.life import LIMITS_KEY, charge
from promptdb.packing import MAGIC, MAX_EXPANSION, is_packed, pack, unpack
from promptdb.testing import encode_tokens

ROOT = Root("aa" * 32, "bb" * 32)


def numbers(count, dtype="F32", seed=0):
    """Numbers as models make them: of a few sizes, with noise below."""
    import numpy

    values = numpy.random.default_rng(seed).standard_normal(count).astype(numpy.float32)
    if dtype == "BF16":
        return (values.view(numpy.uint32) >> 16).astype(numpy.uint16).tobytes()
    return values.tobytes()


def blob_of(num_bytes=64 << 10, dtype="F32", seed=0):
    count = num_bytes // DTYPE_BYTES[dtype]
    return build_blob([(TensorSpec("kv.0", dtype, (count,)), numbers(count, dtype, seed))])


def packed_by_hand(content, size_bytes=None, **options):
    size_bytes = len(content) if size_bytes is None else size_bytes
    return MAGIC + struct.pack("<Q", size_bytes) + zstandard.ZstdCompressor(**options).compress(bytes(content))


# Bytes


@pytest.mark.parametrize(("dtype", "most"), [("F32", 0.9), ("BF16", 0.75)])
def test_numbers_shrink(dtype, most):
    blob = blob_of(1 << 20, dtype)
    packed = pack(blob)
    assert is_packed(packed)
    assert len(packed) < most * len(blob)
    assert len(packed) < 0.95 * len(zstandard.ZstdCompressor(level=19).compress(blob))  # planes are what saves
    assert bytes(unpack(memoryview(packed))) == bytes(blob)


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.lists(
        st.tuples(
            st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 40), max_size=3), st.binary(max_size=9)
        ),
        max_size=4,
    ),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
def test_any_blob_comes_back(tensors, metadata):
    specs = []
    for number, (dtype, shape, pattern) in enumerate(tensors):
        spec = TensorSpec(f"t{number}", dtype, tuple(shape))
        specs.append((spec, (pattern * (spec.size_bytes // max(1, len(pattern)) + 1))[: spec.size_bytes]))
        if not pattern:
            specs[-1] = (spec, os.urandom(spec.size_bytes))
    blob = bytes(build_blob(specs, metadata))
    packed = bytes(pack(blob))
    assert bytes(unpack(memoryview(packed))) == blob
    assert len(packed) <= len(blob)
    if packed != blob:
        assert len(blob) - len(packed) >= max(4096, len(blob) // 16)


def test_what_does_not_pay_is_stored_as_it_is():
    noise = os.urandom(1 << 20)
    for blob in (
        build_blob([(TensorSpec("x", "U8", (len(noise),)), noise)]),
        blob_of(4096),  # saves less than a page
        build_blob([(TensorSpec("x", "U8", (1 << 20,)), bytes(1 << 20))]),  # more than a reader would believe
        b"",
        b"no safetensors" * 10_000,
    ):
        assert pack(blob) is blob
        assert unpack(memoryview(blob)).tobytes() == bytes(blob)


def test_what_was_unpacked_is_aligned():
    import numpy

    tensor = parse_blob(unpack(memoryview(pack(blob_of()))))["kv.0"]
    assert numpy.frombuffer(tensor.data, numpy.uint8).ctypes.data % 64 == 0


HONEST = bytes(blob_of())
HOSTILE = {
    "nothing": MAGIC,
    "half a size": MAGIC + b"\1\2\3",
    "no frame": MAGIC + struct.pack("<Q", 100),
    "no zstd": MAGIC + struct.pack("<Q", 10) + b"\0" * 50,
    "zero bytes": packed_by_hand(b"", 0),
    "more than it says": packed_by_hand(HONEST, len(HONEST) - 1),
    "less than it says": packed_by_hand(HONEST, len(HONEST) + 1),
    "far too large": packed_by_hand(HONEST, 1 << 62),
    "beyond what is believed": packed_by_hand(bytes(1 << 20)),
    "cut off": packed_by_hand(HONEST)[:-20],
    "no safetensors": packed_by_hand(os.urandom(5000)),
    "a window of a gigabyte": MAGIC
    + struct.pack("<Q", 200)
    # A frame by hand: magic, no single segment, window descriptor 2^30, a raw block of 200 bytes.
    + bytes.fromhex("28b52ffd00a0")
    + (200 << 3 | 1).to_bytes(3, "little")
    + bytes(200),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_blobs_are_refused_in_little_memory(name):
    hostile = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(CorruptDataError):
            unpack(memoryview(hostile))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_there_is_a_largest_size(monkeypatch):
    blob = blob_of()
    packed = pack(blob)
    monkeypatch.setattr("promptdb.packing.MAX_BYTES", len(blob) - 1)
    assert pack(blob) is blob
    with pytest.raises(CorruptDataError, match="says that it holds"):
        unpack(memoryview(packed))


def test_memory_follows_what_is_stored_not_what_is_claimed():
    """In a process with little memory to have: a bomb is refused, an honest blob read."""
    code = """
import resource, zstandard, struct
from promptdb.packing import MAGIC, unpack
from promptdb.errors import CorruptDataError
bomb = zstandard.ZstdCompressor().compress(bytes(1 << 30))
import numpy
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
for claim in (1 << 30, 64 * len(bomb), 100):
    try:
        unpack(memoryview(MAGIC + struct.pack("<Q", claim) + bomb))
    except CorruptDataError:
        continue
    raise SystemExit("not refused")
print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "refused\n", done.stderr


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, len(pack(HONEST)) - 1), change=st.integers(1, 255))
def test_flipped_bytes_are_never_a_crash(place, change):
    """Checksums find damage before that; here nothing does, and what comes out has the size that it says, or none."""
    damaged = bytearray(pack(HONEST))
    damaged[place] ^= change
    try:
        found = unpack(memoryview(damaged))
    except CorruptDataError:
        return
    if is_packed(damaged):
        assert len(found) == struct.unpack_from("<Q", damaged, len(MAGIC))[0] <= MAX_EXPANSION * len(damaged)


# Stores


def spans(tokens, size_bytes=64 << 10, dtype="F32"):
    tokens = list(tokens)

    def encode(position):
        blob = blob_of(size_bytes, dtype, seed=tokens[0])
        return [SpanPayload(position, len(tokens), (Group((0, 1), 1, 1, dtype),), {"kv": blob}, 1.0, {})]

    return encode


def put(db, tokens, **options):
    logits = {len(tokens): build_blob([(TensorSpec("logits", "F32", (50_000,)), numbers(50_000))])}
    return db.put(ROOT, pack_tokens(tokens), 0, spans(tokens, **options), logits)


def found(db, tokens):
    return db.lookup(list(tokens), model=ROOT.weights_id, tokenizer=ROOT.tokenizer_id)


def stored_blobs(db, table=BLOBS):
    with db.read() as snapshot:
        return {key: bytes(value) for key, value in snapshot.reader.scan(table)}


def content(db, tokens):
    """What a loader gets of a prompt: the bytes of its blob and of its logits."""
    match = found(db, tokens)
    with db.read() as snapshot:
        record = snapshot.record(match.steps[0].node)
        keys_values = bytes(snapshot.blob(match.steps[0].node, record, "kv")["kv.0"].data)
        return keys_values, bytes(snapshot.logits(next(iter(snapshot.reader.keys(LOGITS)))).data)


def version_of(db):
    with db.read() as snapshot:
        return unpack_record(STORE_KEY, snapshot.reader.get(META, STORE_KEY))["format_version"]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_store_gives_back_what_was_put(tmp_path, dtype):
    with PromptDB(tmp_path / "store", compression="zstd", verify_reads="always") as db:
        put(db, [1, 2, 3], dtype=dtype)
        (blob,) = stored_blobs(db).values()
        (logits,) = stored_blobs(db, LOGITS).values()
        assert is_packed(blob)
        assert is_packed(logits[48:])
        assert db.verify() == []
    with PromptDB(tmp_path / "store", readonly=True) as db:
        expected = parse_blob(blob_of(64 << 10, dtype, seed=1))["kv.0"].data
        assert content(db, [1, 2, 3]) == (bytes(expected), numbers(50_000))
        assert db.limits().compression == "zstd"
        assert version_of(db) == 3


def test_what_is_stored_is_charged(tmp_path):
    """The accounting follows the compressed sizes, to the byte, and so does the quota."""
    charged = {}
    for compression in ("off", "zstd"):
        with PromptDB(tmp_path / compression, compression=compression) as db:
            put(db, [1, 2, 3])
            charged[compression] = db.usage()["charged_bytes"]
            assert db.verify() == []
            blobs, logits = stored_blobs(db), stored_blobs(db, LOGITS)
            (root,) = db.roots()
            assert root[1]["blob_bytes"] == sum(map(len, [*blobs.values(), *logits.values()]))
            large = sum(charge(len(key), len(value)) for table in (blobs, logits) for key, value in table.items())
            assert large < db.usage()["charged_bytes"] < large + 2000
    assert charged["zstd"] < 0.9 * charged["off"]
    room = int(10.2 * charged["zstd"])
    with PromptDB(tmp_path / "quota", compression="zstd", quota_bytes=room) as db:
        counts = []
        for first in range(10, 40):
            put(db, [first, 2, 3])
            counts.append(db.stat()["num_nodes"])
            assert db.usage()["charged_bytes"] <= room
        # As many as fit; then a put removes two or three, so that the next ones find room.
        assert counts[:10] == list(range(1, 11))
        assert set(counts[10:]) == {8, 9, 10}
        assert db.verify() == []


def test_the_setting_holds_from_then_on(tmp_path):
    with PromptDB(tmp_path / "store") as db:
        assert version_of(db) == 2
        put(db, [1, 2])
        db.set_compression("zstd")
        assert version_of(db) == 3
        with PromptDB(tmp_path / "store") as other:
            put(other, [3, 4])
        db.set_compression("off")
        put(db, [5, 6])
        packed = sorted(map(is_packed, stored_blobs(db).values()))
        assert packed == [False, False, True]
        db.set_quota(10 << 20, policy="lru")
        db.set_compression("zstd")
        limits = db.limits()
        assert (limits.quota_bytes, limits.policy, limits.compression) == (10 << 20, "lru", "zstd")
        db.set_quota(None, policy="fifo")
        assert db.limits().compression == "zstd"
        assert version_of(db) == 3
        for tokens in ([1, 2], [3, 4], [5, 6]):
            assert content(db, tokens)[0] == bytes(parse_blob(blob_of(seed=tokens[0]))["kv.0"].data)
        assert db.verify() == []


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(StoreError, match="choose one of off, zstd"):
        PromptDB(tmp_path / "store", compression="gzip")
    assert not (tmp_path / "store").exists()
    with PromptDB(tmp_path / "store") as db, pytest.raises(StoreError, match="choose one of"):
        db.set_compression("lz4")
    with pytest.raises(StoreError, match="set_compression"):
        PromptDB(tmp_path / "store", compression="zstd")
    with PromptDB(tmp_path / "store", compression="off"):
        pass
    with PromptDB.in_memory() as db, pytest.raises((StoreError, InputTypeError)):
        db.set_compression(7)


def test_settings_that_cannot_be_are_damage(tmp_path):
    with PromptDB(tmp_path / "store") as db:
        fields = {"quota_bytes": 0, "policy": "cost", "compression": "rot13"}
        db._index.transact(lambda writer: writer.put(META, LIMITS_KEY, pack_record(LIMITS_KEY, fields)))
        assert [problem.table for problem in db.verify()] == [META]
        db.verify(fix=True)
        assert db.verify() == []


def test_damage_is_a_miss(tmp_path):
    with PromptDB(tmp_path / "store", compression="zstd", verify_reads="always") as db:
        put(db, [1, 2])
        ((key, value),) = stored_blobs(db).items()
        damaged = value[:100] + bytes([value[100] ^ 1]) + value[101:]
        db._index.transact(lambda writer: writer.put(BLOBS, key, damaged))
        with pytest.raises(CorruptDataError, match="checksum"):
            content(db, [1, 2])
        assert [problem.table for problem in db.verify(fix=True)] == [BLOBS]
        assert found(db, [1, 2]).num_tokens == 0
        put(db, [1, 2])
        assert content(db, [1, 2])[1] == numbers(50_000)


def test_a_program_of_the_version_before_refuses_it(tmp_path, monkeypatch):
    with PromptDB(tmp_path / "store", compression="zstd"):
        pass
    with PromptDB(tmp_path / "plain"):
        pass
    monkeypatch.setattr("promptdb.opening.FORMAT_VERSION", 2)
    with pytest.raises(FormatVersionError, match="upgrade promptdb"):
        PromptDB(tmp_path / "store")
    with PromptDB(tmp_path / "plain"):  # it holds nothing that is new
        pass


def test_without_the_library(tmp_path, monkeypatch):
    """What needs it says so; nothing is taken for damage and removed."""
    with PromptDB(tmp_path / "store", compression="zstd", chunk_tokens=1000) as db:
        put(db, [1, 2])
        db.put(ROOT, pack_tokens([7]), 0, encode_tokens(pack_tokens([7])))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with PromptDB(tmp_path / "store") as db:
        assert found(db, [1, 2]).num_tokens == 2
        for use in (
            lambda: content(db, [1, 2]),
            lambda: put(db, [8, 9]),
            db.verify,
            lambda: db.set_compression("zstd"),
        ):
            with pytest.raises(MissingLibraryError, match=r"pip install 'promptdb\[compression\]'"):
                use()
        db.set_compression("off")
        put(db, [8, 9])
    with pytest.raises(MissingLibraryError):
        PromptDB(tmp_path / "new", compression="zstd")
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    with PromptDB(tmp_path / "store") as db:
        assert content(db, [1, 2])[0] == bytes(parse_blob(blob_of(seed=1))["kv.0"].data)
        assert db.verify() == []


def test_compact_gc_and_pins_know_nothing_of_it(tmp_path):
    with PromptDB(tmp_path / "store", compression="zstd") as db:
        for first in range(20):
            put(db, [first, 1])
        db.pin(ROOT, [3, 1])
        assert db.gc(0).num_evicted == 19
        db.compact()
        assert content(db, [3, 1])[0] == bytes(parse_blob(blob_of(seed=3))["kv.0"].data)
        assert db.verify() == []
