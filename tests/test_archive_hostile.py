"""Archives that are damaged or forged: refused, with little memory, and nothing wrong is stored."""

import io
import math
import random
import struct
import tracemalloc

import msgpack
import pytest
from archive_tools import (
    LAYOUT,
    MODEL,
    OTHER_MODEL,
    ROOT,
    ROOTS,
    TOKENIZER,
    archive_of,
    check_content,
    encoded,
    exported,
    frames_of,
    imported,
    logits_of,
    lookup,
    payload,
    put,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from promptdb import PromptDB
from promptdb.archive import BrokenArchiveError, check_archive
from promptdb.blobs import TensorSpec, TensorView, build_blob
from promptdb.errors import FormatVersionError
from promptdb.format import (
    MAX_RECORD_VALUES,
    BlobEntry,
    Group,
    NodeRecord,
    _check_number_of_values,
    checksum,
    pack_record,
    pack_root,
    unpack_record,
)
from promptdb.frames import ARCHIVE_VERSION, MAGIC, FrameWriter
from promptdb.intake import is_finite
from promptdb.keys import PrefixHasher, Root, node_id, pack_tokens, unpack_tokens


@pytest.fixture
def sound():
    """An archive with a branch and logits; what it holds, by prompt."""
    prompts = [tuple(range(20)), (*range(10), 99, 98, 97), (5, 6)]
    with PromptDB.in_memory(chunk_tokens=8) as source:
        for tokens in prompts:
            put(source, tokens, logits=[len(tokens), 1])
        return exported(source), prompts


def check_is_harmless(target, prompts):
    """Assert that a store holds nothing but what belongs to the prompts it may hold."""
    assert target.verify() == []
    for tokens in prompts:
        check_content(target, tokens)
    known = {tokens[:end] for tokens in prompts for end in range(1, len(tokens) + 1)}
    with target.read() as snapshot:
        for node, record in target.nodes():
            assert tuple(unpack_tokens(target.prefix(snapshot, record))) in known, node


def test_frames_in_order(sound):
    data, _ = sound
    assert archive_of(frames_of(data)) == data
    kinds = [kind for kind, _ in frames_of(data)]
    assert kinds[:2] == [b"MANI", b"ROOT"]
    assert kinds[-1] == b"DONE"
    assert kinds.count(b"BLOB") == 2 * kinds.count(b"NODE")
    report = check_archive(io.BytesIO(data))
    assert report.is_complete
    assert report.num_spans == kinds.count(b"NODE")


@pytest.mark.parametrize("seed", range(10))
def test_damage_anywhere_is_noticed_and_stores_nothing_wrong(sound, seed):
    """500 times: a byte flipped, bytes taken out or put in, the end cut off, or something behind it."""
    data, prompts = sound
    source = random.Random(seed)
    for _ in range(50):
        damaged = bytearray(data)
        at = source.randrange(len(data))
        how = source.choice(["flip", "bytes", "cut", "insert", "delete", "extend", "swap", "zero"])
        if how == "flip":
            damaged[at] ^= 1 << source.randrange(8)
        elif how == "bytes":
            damaged[at : at + 8] = source.randbytes(8)
        elif how == "cut":
            del damaged[at:]
        elif how == "insert":
            damaged[at:at] = source.randbytes(source.randrange(1, 50))
        elif how == "delete":
            del damaged[at : at + source.randrange(1, 50)]
        elif how == "extend":
            damaged += source.randbytes(source.randrange(1, 50))
        elif how == "swap":
            damaged[at : at + 8] = reversed(damaged[at : at + 8])
        else:
            damaged[at : at + 64] = bytes(len(damaged[at : at + 64]))
        if damaged == data:
            continue
        with PromptDB.in_memory(chunk_tokens=6) as target:
            tracemalloc.start()
            try:
                with pytest.raises((BrokenArchiveError, FormatVersionError)) as raised:
                    imported(target, bytes(damaged))
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < 8 << 20, (how, at)
            check_is_harmless(target, prompts)
            if isinstance(raised.value, BrokenArchiveError):
                report = raised.value.report
                assert not report.is_complete
                assert report.spans_stored == target.stat()["num_nodes"]
                if report.num_bytes:
                    told = (
                        f"{report.spans_stored:,} spans are stored"
                        if report.spans_stored
                        else "nothing of it was stored"
                    )
                    assert told in raised.value.hint
            # And then the whole one.
            assert imported(target, data).is_complete
            assert [check_content(target, tokens) for tokens in prompts] == [len(tokens) for tokens in prompts]
            assert target.verify() == []


def body_of(root, tokens, start, record=None, node=None):
    """Return the frames of a span, with fields of its record replaced."""
    packed = pack_tokens(tokens)
    span = payload(root, packed, start, len(tokens))
    child_hash = PrefixHasher(root.digest, packed).at(start)
    record = {"child_hash": child_hash, "span": packed[4 * start :], "start": start, "layout": LAYOUT} | (record or {})
    blobs = record.pop("blobs", span.blobs)
    node = node or node_id(record["child_hash"], record["span"])
    entries = {kind: BlobEntry(len(blob), checksum(node + kind.encode(), blob)) for kind, blob in blobs.items()}
    entries |= record.pop("entries", {})
    fields = {"root": root, "parent": b"", "blobs": entries, "created_unix_s": 1.0, "compute_s": 0.5, "provenance": {}}
    packed_record = NodeRecord(**(fields | record)).pack(node)
    return [(b"NODE", node + packed_record), *((b"BLOB", bytes(blob)) for blob in blobs.values())]


TOTALS = {"num_nodes": 1, "num_tokens": 1, "blob_bytes": 1}
MANI = (b"MANI", pack_record(b"manifest", {"num_namespaces": 1}))


def root_frame(root):
    return (b"ROOT", root.digest + pack_root(root, TOTALS))


HEAD = [MANI, root_frame(ROOT)]
GOOD = body_of(ROOT, range(4), 0)


def hostile(frames, match=None, before=1, **options):
    """Assert that an archive is refused, what came before is stored, and nothing else."""
    data = frames if isinstance(frames, bytes) else archive_of(frames)
    with PromptDB.in_memory() as target:
        tracemalloc.start()
        try:
            with pytest.raises(BrokenArchiveError, match=match) as raised:
                imported(target, data, **options)
            assert tracemalloc.get_traced_memory()[1] < 4 * len(data) + (4 << 20)
        finally:
            tracemalloc.stop()
        assert raised.value.report.spans_stored == target.stat()["num_nodes"] == before
        assert target.verify() == []
        assert check_content(target, range(4)) == (4 if before else 0)


def test_the_frames_that_the_tests_forge_are_sound():
    more = body_of(ROOT, [*range(4), 8], 4)
    logits = (b"LOGI", (5).to_bytes(8, "little") + bytes(logits_of(ROOT, pack_tokens([*range(4), 8]))))
    with PromptDB.in_memory() as target:
        report = imported(target, archive_of([*HEAD, *GOOD, *more, logits]))
        assert (report.spans_stored, report.logits_stored) == (2, 1)
        assert check_content(target, [*range(4), 8]) == 5
        assert target.verify() == []


def tensors_blob(*tensors):
    """Return a blob of zeros with tensors (name, dtype, shape)."""
    specs = [TensorSpec(*tensor) for tensor in tensors]
    return build_blob([(spec, bytes(spec.size_bytes)) for spec in specs])


def raw_blob(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


def kv_with(value, group=0, at=0):
    """Return blobs of tokens 0 to 3 with one number of their keys and values replaced."""
    blobs = dict(payload(ROOT, pack_tokens(range(4)), 0, 4).blobs)
    kv = bytearray(blobs["kv"])
    offset = len(kv) - (2 * 1 * 4 * 2) * 2 if group else len(kv) - (2 * 1 * 4 * 2) * 2 - (3 * 2 * 4 * 3) * 4
    raw = encoded(LAYOUT[group].dtype, [value])
    offset += at * len(raw)
    kv[offset : offset + len(raw)] = raw
    return blobs | {"kv": kv}


KV, LP = (payload(ROOT, pack_tokens(range(4)), 0, 4).blobs[kind] for kind in ("kv", "lp"))
KV_TENSORS = [("kv.0", "F32", (3, 2, 4, 3)), ("kv.1", "BF16", (2, 1, 4, 2))]
LP_TENSORS = [("token_logprobs", "F32", (4,)), ("greedy_ids", "I32", (4,))]

BLOBS = {
    ("an extra tensor", "other tensors"): {"kv": tensors_blob(*KV_TENSORS, ("extra", "F32", (1,))), "lp": LP},
    ("an empty extra tensor", "other tensors"): {"kv": tensors_blob(*KV_TENSORS, ("extra", "F32", (0,))), "lp": LP},
    ("a tensor less", "other tensors"): {"kv": tensors_blob(KV_TENSORS[0]), "lp": LP},
    ("no tensor", "other tensors"): {"kv": tensors_blob(), "lp": LP},
    ("another dtype", "other tensors"): {"kv": tensors_blob(KV_TENSORS[0], ("kv.1", "F16", (2, 1, 4, 2))), "lp": LP},
    ("axes swapped", "other tensors"): {"kv": tensors_blob(("kv.0", "F32", (3, 2, 3, 4)), KV_TENSORS[1]), "lp": LP},
    ("tokens less", "other tensors"): {"kv": tensors_blob(("kv.0", "F32", (3, 2, 3, 3)), KV_TENSORS[1]), "lp": LP},
    ("scores of other tokens", "other tensors"): {
        "kv": KV,
        "lp": tensors_blob(("token_logprobs", "F32", (3,)), LP_TENSORS[1]),
    },
    ("scores with an extra tensor", "other tensors"): {"kv": KV, "lp": tensors_blob(*LP_TENSORS, ("x", "U8", (1,)))},
    ("no scores", "other tensors"): {"kv": KV, "lp": tensors_blob(LP_TENSORS[1])},
    ("NaN", "NaN or infinity in kv.0"): kv_with(math.nan),
    ("NaN in BF16", "NaN or infinity in kv.1"): kv_with(math.nan, group=1, at=3),
    ("infinity", "NaN or infinity in kv.0"): kv_with(-math.inf, at=71),
    ("NaN scores", "log-probabilities with NaN"): {
        "kv": KV,
        "lp": LP[:-32] + struct.pack("<4f4i", math.nan, -1, math.nan, -1, -1, 0, 0, 0),
    },
    ("IDs below zero", "ID below zero"): {"kv": KV, "lp": LP[:-16] + struct.pack("<4i", -1, 0, -2, 0)},
    ("a header that is no JSON", "not JSON"): {"kv": raw_blob(b"{" * 100), "lp": LP},
    ("a header longer than the blob", "with a header of"): {"kv": struct.pack("<Q", 1 << 60) + bytes(200), "lp": LP},
    ("a negative offset", "that cannot be"): {
        "kv": raw_blob(b'{"kv.0":{"dtype":"F32","shape":[0],"data_offsets":[-4,-4]}}'),
        "lp": LP,
    },
    ("a huge shape", "after 0 bytes"): {
        "kv": raw_blob(b'{"kv.0":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}', bytes(4)),
        "lp": LP,
    },
    ("empty", "a blob of 0 bytes"): {"kv": b"", "lp": LP},
}


@pytest.mark.parametrize("case", BLOBS, ids=" ".join)
def test_blobs_that_are_not_what_their_record_says(case):
    wrong = body_of(ROOT, [7, *range(3)], 0, {"blobs": BLOBS[case]})
    hostile([*HEAD, *GOOD, *wrong, *body_of(ROOT, [1], 0)], case[1])


def test_the_first_token_alone_has_no_score():
    blobs = {"kv": KV, "lp": LP[:-32] + struct.pack("<4f4i", math.nan, -1, -1, -1, -1, 0, 0, 0)}
    with PromptDB.in_memory() as target:
        imported(target, archive_of([*HEAD, *body_of(ROOT, range(4), 0, {"blobs": blobs})]))
        assert lookup(target, range(4)).num_tokens == 4
    later = body_of(ROOT, range(8), 4, {"blobs": blobs})
    hostile([*HEAD, *GOOD, *later], "log-probabilities with NaN")


def group(**fields):
    return Group(**({"slots": (0, 1), "kv_heads": 1, "head_dim": 2, "dtype": "F32"} | fields))


RECORDS = {
    ("half a token", "field that cannot be"): {"span": pack_tokens([1]) + b"\0"},
    ("no tokens", "field that cannot be"): {"span": b""},
    ("another prefix", "belongs to other tokens"): {"child_hash": bytes(32)},
    ("a start in the middle", "belongs to other tokens"): {"start": 2},
    ("a start that nothing reaches", "not in the archive"): {"start": 1 << 40},
    ("too long", "not in the archive"): {"start": 1 << 24},
    ("another model", "another identity"): {"root": Root(OTHER_MODEL, TOKENIZER)},
    ("another tokenizer", "another identity"): {"root": Root(MODEL, MODEL)},
    ("another namespace", "another identity"): {"root": Root(MODEL, TOKENIZER, "tenant")},
    ("an intervention", "another identity"): {"root": Root(MODEL, TOKENIZER, "", "steered")},
    ("no layout", "layout that cannot be"): {"layout": ()},
    ("a slot twice", "layout that cannot be"): {"layout": (group(slots=(0, 0)),)},
    ("no slots", "layout that cannot be"): {"layout": (group(slots=()),)},
    ("no heads", "layout that cannot be"): {"layout": (group(kv_heads=0),)},
    ("a huge dimension", "layout that cannot be"): {"layout": (group(head_dim=1 << 62),)},
    ("many groups", "layout that cannot be"): {"layout": tuple(group(slots=(at,)) for at in range(5000))},
    ("an unknown dtype", "layout that cannot be"): {"layout": (group(dtype="F31"),)},
    ("another layout", "laid out otherwise"): {"layout": (LAYOUT[1], LAYOUT[0])},
    ("time that never ends", "took inf s"): {"compute_s": math.inf},
    ("time that runs back", "took -1.0 s"): {"compute_s": -1.0},
    ("a date that is none", "at nan"): {"created_unix_s": math.nan},
    ("an endless number", "took 184"): {"compute_s": (1 << 64) - 1},
    ("much provenance", "provenance cannot be"): {"provenance": {str(at): at for at in range(100)}},
    ("provenance that steers a terminal", "provenance cannot be"): {"provenance": {"torch": "\x1b]0;x\x07"}},
    ("provenance of another type", "provenance cannot be"): {"provenance": {"torch": [1]}},
    ("an unknown kind", "hidden"): {"entries": {"hidden": BlobEntry(4, bytes(16))}},
    ("a blob that is larger", "not that of its record"): {"entries": {"kv": BlobEntry(len(KV) + 1, bytes(16))}},
    ("a blob that is smaller", "a BLOB frame of"): {"entries": {"kv": BlobEntry(len(KV) - 1, bytes(16))}},
    ("a blob that is huge", "1,856 may be"): {"entries": {"kv": BlobEntry((1 << 63) - 1, bytes(16))}},
    ("another checksum", "not that of its record"): {"entries": {"kv": BlobEntry(len(KV), bytes(16))}},
    ("a blob without bytes", "a BLOB frame of"): {"entries": {"kv": BlobEntry(0, bytes(16))}},
}


@pytest.mark.parametrize("case", RECORDS, ids=" ".join)
def test_records_that_do_not_fit(case):
    wrong = body_of(ROOT, [*range(4), 9, 9, 9, 9], 4, dict(RECORDS[case]))
    hostile([*HEAD, *GOOD, *wrong], case[1])


def test_spans_and_prompts_that_are_too_long():
    hostile([*HEAD, *GOOD, *body_of(ROOT, [9], 0, {"span": bytes(4 << 20) + bytes(4)})], "a span of 1,048,577 tokens")
    path = [*HEAD, *GOOD, root_frame(ROOT), (b"PATH", bytes(4 << 24))]
    record = {"start": 1 << 24, "child_hash": bytes(32), "span": bytes(4)}
    with PromptDB.in_memory() as target, pytest.raises(BrokenArchiveError, match="ends at 16,777,217"):
        imported(target, archive_of([*path, *body_of(ROOT, [9], 0, record)]))
    hostile([*HEAD, *GOOD, root_frame(ROOT), (b"PATH", bytes((4 << 24) + 4))], "PATH frame of")


def test_claims_of_a_record_that_only_a_second_look_refutes():
    """The node ID, or the checksum, is right; what stands beside it is not."""
    tokens = [*range(4), 9]
    node = node_id(PrefixHasher(ROOT.digest, pack_tokens(tokens)).at(4), pack_tokens(tokens)[16:])
    hostile([*HEAD, *GOOD, *body_of(ROOT, tokens, 4, {"child_hash": bytes(32)}, node)], "belongs to other tokens")
    blob = payload(ROOT, pack_tokens(tokens), 4, 5).blobs["kv"]
    longer = {"entries": {"kv": BlobEntry(len(blob) + 1, checksum(node + b"kv", blob))}}
    hostile([*HEAD, *GOOD, *body_of(ROOT, tokens, 4, longer)], "not that of its record")


def test_kinds_of_blobs_that_are_missing():
    for kinds in ("kv",), ("lp",), ():
        blobs = {kind: {"kv": KV, "lp": LP}[kind] for kind in kinds}
        hostile([*HEAD, *GOOD, *body_of(ROOT, [7, 7, 7, 7], 0, {"blobs": blobs})], "where kv and lp should be")


def test_a_node_id_that_is_not_that_of_the_tokens():
    wrong = body_of(ROOT, [*range(4), 9], 4, node=bytes(32))
    hostile([*HEAD, *GOOD, *wrong], "belongs to other tokens")
    # A span of another identity, whole and with its own ID, under this one.
    other = body_of(ROOTS[1], [*range(4), 9], 4, {"root": ROOT})
    hostile([*HEAD, *GOOD, *other], "belongs to other tokens")


def test_a_prefix_that_is_claimed_is_not_believed():
    """A span that says what it stands on, in an archive without that, is stored only where that is."""
    claimed = [*HEAD, (b"PATH", pack_tokens([5, 6, 7])), *body_of(ROOT, [5, 6, 7, 8], 3)]
    with PromptDB.in_memory() as target:
        report = imported(target, archive_of(claimed))
        assert (report.spans_stored, report.spans_dropped, target.stat()["num_nodes"]) == (0, 1, 0)
        put(target, [5, 6, 7])
        assert imported(target, archive_of(claimed)).spans_stored == 1
        assert check_content(target, [5, 6, 7, 8]) == 4
    # The span's own start and prefix, under other tokens than those that gave its digest.
    hostile([*HEAD, (b"PATH", pack_tokens([5, 6, 9])), *body_of(ROOT, [5, 6, 7, 8], 3)], "belongs to other", before=0)
    hostile([*HEAD, (b"PATH", b"abcde")], "no tokens", before=0)


def test_logits_that_are_not():
    sound = bytes(logits_of(ROOT, pack_tokens(range(4))))
    wrong = {
        "no blob": b"",
        "another name": bytes(tensors_blob(("logit", "F32", (5,)))),
        "two": bytes(tensors_blob(("logits", "F32", (5,)), ("more", "F32", (1,)))),
        "integers": bytes(tensors_blob(("logits", "I32", (5,)))),
        "none": bytes(tensors_blob(("logits", "F32", (0,)))),
        "a matrix": bytes(tensors_blob(("logits", "F32", (5, 1)))),
        "NaN": sound[:-4] + struct.pack("<f", math.nan),
    }
    for blob in wrong.values():
        hostile([*HEAD, *GOOD, (b"LOGI", (4).to_bytes(8, "little") + blob)], "logits|a blob of 0 bytes")
    for position in 0, 5, 1 << 63:
        hostile([*HEAD, *GOOD, (b"LOGI", position.to_bytes(8, "little") + sound)], "not inside their span")
    twice = (b"LOGI", (4).to_bytes(8, "little") + sound)
    hostile([*HEAD, *GOOD, twice, twice], "not inside their span")
    masked = sound[:-4] + struct.pack("<f", -math.inf)
    with PromptDB.in_memory() as target:
        imported(target, archive_of([*HEAD, *GOOD, (b"LOGI", (4).to_bytes(8, "little") + masked)]))
        assert lookup(target, range(4)).has_logits


def test_frames_in_the_wrong_place():
    for frames in (
        [MANI, *GOOD],
        [root_frame(ROOT), *GOOD],
        [*HEAD, *GOOD, (b"PATH", b"")],
        [*HEAD, *GOOD, MANI],
        [*HEAD, *GOOD, (b"BLOB", bytes(KV))],
        [*HEAD, *GOOD, (b"MODL", bytes(32) + pack_record(bytes(32), {}))],
        [*HEAD, (b"LOGI", bytes(8)), *GOOD],
        [*HEAD, *GOOD, (b"/etc", b"")],
        [*HEAD, *GOOD, (b"NODE", b"")],
        [*HEAD, *GOOD, (b"ROOT", bytes(40))],
        [*HEAD, *GOOD, GOOD[0], GOOD[2], GOOD[1]],
        [*HEAD, *GOOD, (b"ROOT", bytes(32) + pack_root(ROOT, TOTALS)[16:])],
        [],
    ):
        stored = any(kind == b"NODE" for kind, _ in frames) and frames[:2] == HEAD and frames[2] == GOOD[0]
        hostile(frames, before=int(stored))


def test_a_root_under_another_digest():
    other = Root(OTHER_MODEL, TOKENIZER)
    body = checksum(other.digest, pack_root(ROOT, TOTALS)[16:]) + pack_root(ROOT, TOTALS)[16:]
    hostile([*HEAD, *GOOD, (b"ROOT", other.digest + body)], "do not give its digest")
    long = Root("a" * 2000, TOKENIZER)
    hostile([*HEAD, *GOOD, root_frame(long)], "characters")


def test_totals_and_digest_at_the_end():
    for done in ({"num_spans": 2}, {"num_tokens": 0}, {"blob_bytes": -1}, {"num_roots": None}, {"digest": bytes(32)}):
        hostile(archive_of([*HEAD, *GOOD], **done), "totals|digest")
    hostile(archive_of([*HEAD, *GOOD]) * 2, "follows its end")
    with PromptDB.in_memory() as target:
        assert imported(target, archive_of([*HEAD, *GOOD], more=[1])).is_complete


def bomb(size):
    """Return msgpack of a small file's size that becomes a large object: arrays of empty arrays."""
    inner = b"\xdd" + (1000).to_bytes(4, "big") + b"\x90" * 1000
    return b"\x81\xa4root\xdd" + (size // 1005).to_bytes(4, "big") + inner * (size // 1005)


NESTED = (b"\xdd\x00\x01\x00\x00" * 400 + b"\x00") * 20


@pytest.mark.parametrize("body", [bomb(1 << 20), b"\x91" * (1 << 18), b"\x81\xa1a" * (1 << 18), NESTED, b"\xc1" * 99])
def test_records_that_blow_up(body):
    """In every frame that is a record: little memory, and a clear refusal."""
    stream = {
        b"NODE": [*HEAD, *GOOD, (b"NODE", bytes(32) + checksum(bytes(32), body) + body)],
        b"ROOT": [*HEAD, *GOOD, (b"ROOT", bytes(32) + checksum(bytes(32), body) + body)],
        b"MANI": [(b"MANI", checksum(b"manifest", body) + body)],
        b"TOKN": [MANI, (b"TOKN", bytes(32) + checksum(bytes(32), body) + body)],
    }
    for kind, frames in stream.items():
        data = archive_of(frames)
        with PromptDB.in_memory() as target:
            tracemalloc.start()
            try:
                with pytest.raises(BrokenArchiveError, match=r"frame of|readable|not a map"):
                    imported(target, data)
                assert tracemalloc.get_traced_memory()[1] < 4 * len(data) + (40 << 20), kind
            finally:
                tracemalloc.stop()
            assert target.verify() == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.binary(), inner),
    max_leaves=60,
)


@settings(max_examples=100, deadline=None)
@given(value=VALUES, size=st.sampled_from([0, 300, 70_000]))
def test_records_of_any_content_are_counted_right(value, size):
    """Whatever msgpack writes passes, and is counted to the value."""
    body = msgpack.packb({"value": value, "text": "x" * size, "raw": bytes(size), "many": [1.5] * (size // 20)})
    _check_number_of_values(body)
    record = checksum(b"key", body) + body
    assert repr(unpack_record(b"key", record)["value"]) == repr(value)
    with pytest.raises(ValueError, match="middle of a value"):
        _check_number_of_values(msgpack.packb([1] * 20)[:15])


def test_the_most_values_that_a_record_may_hold():
    rows = [[0] * 65_535 for _ in range(MAX_RECORD_VALUES // 65_536)]
    with pytest.raises(ValueError, match="more than"):
        _check_number_of_values(msgpack.packb(rows))
    _check_number_of_values(msgpack.packb(rows[1:]))


@pytest.mark.parametrize("kind", [b"MANI", b"NODE", b"BLOB", b"TOKN", b"LOGI", b"PATH", b"DONE"])
@pytest.mark.parametrize("size", [1 << 20, (1 << 32) + 1, (1 << 63) - 1, (1 << 64) - 1])
def test_lengths_are_not_believed(kind, size):
    """A frame that claims any length takes no more memory than the bytes that are there."""
    before = {b"MANI": [], b"TOKN": [MANI], b"PATH": HEAD, b"NODE": HEAD, b"BLOB": [*HEAD, GOOD[0]]}
    frames = before.get(kind, [*HEAD, *GOOD])
    data = archive_of(frames)
    last = archive_of([*frames])  # up to where DONE begins
    end = len(last) - 28 - len(frames_of(last)[-1][1]) if frames[:1] == [MANI] and kind != b"BLOB" else None
    if end is None:
        stream = io.BytesIO()
        writer = FrameWriter(stream)
        for each in frames:
            writer.write(*each)
        end = len(stream.getvalue())
    data = data[:end] + kind + struct.pack("<Q", size) + bytes(16) + b"x" * 1000
    tracemalloc.start()
    try:
        with PromptDB.in_memory() as target, pytest.raises(BrokenArchiveError, match=r"may be|ends in the middle"):
            imported(target, data)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_blobs_are_bounded_by_what_the_receiver_allows():
    hostile([*HEAD, *GOOD], "are allowed", before=0, max_blob_bytes=100)


def test_counts_are_bounded():
    entries = []
    for number in range(10_001):
        key = number.to_bytes(32, "big")
        entries.append((b"MODL", key + pack_record(key, {"name": "m"})))
    hostile([MANI, *entries], "more than 10,000", before=0, wants_model=lambda _: False)


@pytest.mark.parametrize("data", [b"", b"\x89", MAGIC, b"PK\x03\x04" + bytes(100), b"\x1f\x8b", bytes(1000), MAGIC[:8]])
def test_what_is_no_archive(data):
    with PromptDB.in_memory() as target, pytest.raises(BrokenArchiveError, match=r"no promptdb archive|too early"):
        imported(target, data)


def test_a_newer_version_says_what_to_do(sound):
    data, _ = sound
    newer = MAGIC + struct.pack("<I", ARCHIVE_VERSION + 1) + data[16:]
    with PromptDB.in_memory() as target, pytest.raises(FormatVersionError, match="upgrade promptdb"):
        imported(target, newer)
    with PromptDB.in_memory() as target, pytest.raises(BrokenArchiveError, match="version 0"):
        imported(target, MAGIC + bytes(4) + data[16:])


def test_mangled_line_ends_are_noticed(sound):
    data, _ = sound
    with PromptDB.in_memory() as target, pytest.raises(BrokenArchiveError, match="no promptdb archive"):
        imported(target, data.replace(b"\r\n", b"\n"))


def test_layouts_that_differ_from_those_in_the_store():
    scores = tensors_blob(("token_logprobs", "F32", (1,)), ("greedy_ids", "I32", (1,)))
    other = {"layout": (group(),), "blobs": {"kv": tensors_blob(("kv.0", "F32", (2, 1, 1, 2))), "lp": scores}}
    after = [*HEAD, (b"PATH", pack_tokens(range(4))), *body_of(ROOT, [*range(4), 9], 4, dict(other))]
    beside = [*HEAD, *body_of(ROOT, [0], 0, dict(other))]
    for frames, match in (after, "than what it stands on"), (beside, "than those of the same weights in the store"):
        with PromptDB.in_memory() as target:
            put(target, range(4))
            with pytest.raises(BrokenArchiveError, match=match):
                imported(target, archive_of(frames))
            assert check_content(target, range(4)) == 4
            assert target.stat()["num_nodes"] == 1


# Finite numbers


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=20), dtype=st.sampled_from(["F32", "F64", "F16", "BF16"])
)
def test_finite_numbers_are_told_from_others(values, dtype):
    if dtype == "BF16":
        raw = encoded("BF16", values)
        kept = [struct.unpack("<f", b"\0\0" + raw[at : at + 2])[0] for at in range(0, len(raw), 2)]
    elif dtype == "F16":
        kept = [
            value if not math.isfinite(value) or abs(value) < 65000 else math.copysign(6e4, value) for value in values
        ]
        raw = struct.pack(f"<{len(kept)}e", *kept)
    else:
        kept, raw = values, struct.pack(f"<{len(values)}{'f' if dtype == 'F32' else 'd'}", *values)
    view = TensorView(dtype, (len(kept),), memoryview(raw))
    assert is_finite(view) == all(map(math.isfinite, kept))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2"])
def test_finite_numbers_agree_with_torch(dtype):
    import torch

    from promptdb.cache import TORCH_DTYPES

    kind = TORCH_DTYPES.get(dtype) or {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[dtype]
    width = kind.itemsize
    source = random.Random(dtype)
    every = range(1 << 8 * width) if width <= 2 else [source.getrandbits(8 * width) for _ in range(20_000)]
    # Exponents of all ones are rare among random ones.
    top = {4: 0x7F800000, 8: 0x7FF << 52}.get(width, 0)
    every = [*every, top, *(top | source.getrandbits(20) for _ in range(200))]
    data = bytearray(b"".join((number % (1 << 8 * width)).to_bytes(width, "little") for number in every))
    finite = torch.isfinite(torch.frombuffer(data, dtype=kind).to(torch.float64)).tolist()
    for at, expected in zip(range(0, len(data), width), finite, strict=True):
        raw = bytes(data[at : at + width])
        assert is_finite(TensorView(dtype, (1,), memoryview(raw))) == expected, raw.hex()


def test_one_bad_number_in_a_large_tensor():
    data = bytearray(struct.pack("<f", 3e38) * 400_000)  # exponents that have to be looked at twice
    view = TensorView("F32", (400_000,), memoryview(data))
    assert is_finite(view)
    for at in 0, 65_535, 65_536, 399_999:
        data[4 * at : 4 * at + 4] = struct.pack("<f", math.nan)
        assert not is_finite(view)
        data[4 * at : 4 * at + 4] = struct.pack("<f", -3e38)
    assert is_finite(view)
