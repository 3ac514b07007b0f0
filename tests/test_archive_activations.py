"""Archives with recorded activations: every row arrives where its token is, and nothing else is believed."""

from __future__ import annotations

import io
import math
import struct

import pytest
import torch
from cli_tools import run, run_json
from conftest import TEXT, shared_model, shared_tokenizer

from promptdb import Engine, PromptDB, Recorder
from promptdb.activations import Series
from promptdb.archive import BrokenArchiveError, ImportOptions, Selection, check_archive, export_nodes, import_archive
from promptdb.blobs import TensorSpec, build_blob
from promptdb.errors import FormatVersionError, NotRecordedError
from promptdb.format import ACTIVATIONS
from promptdb.frames import DONE, DONE_KEY, RECORDED, FrameReader, FrameWriter
from promptdb.hook_points import HookVariableNames as N
from promptdb.incoming import LIMITS
from promptdb.keys import pack_tokens

IDS = list(TEXT.encode()[:60])
PROMPTS = [IDS, [*IDS[:35], 1, 2, 3], IDS[:20]]
POINTS = [N.POST_MLP, N.ATTN_PROBS, N.POST_MASK_ATTN_WEIGHTS, N.KEY_STATES, N.POST_FINAL_LAYER_NORM]


@pytest.fixture(scope="module")
def archive():
    """An archive, and what is read of the store that it was made of."""
    stream = io.BytesIO()
    with PromptDB.in_memory(chunk_tokens=16) as db, Engine(db, shared_model("gemma2"), shared_tokenizer()) as engine:
        recorder = Recorder(engine, POINTS)
        expected = [recording.tensors() for recording in recorder.run(PROMPTS)]
        Recorder(engine, N.POST_ACT, layers=0, positions=[3, 17, -1], dtype="float16").run(PROMPTS[:1])
        report = export_nodes(db, Selection(), stream)
        assert report.num_activations == sum(each.num_spans for each in db.recorded())
        assert report.blob_bytes == sum(amounts["blob_bytes"] for _, amounts in db.roots())
        root = engine.root
    return stream.getvalue(), expected, report, root


def read(db, root, prompt, point, layer, **options):
    names = {"model": root.weights_id, "tokenizer": root.tokenizer_id, "namespace": root.namespace}
    return db.activations(prompt, point, layer, **names, **options)


@pytest.mark.parametrize("chunk", [16, 256, 5])
@pytest.mark.parametrize("before", ["empty", "tokens", "cut elsewhere", "rows"])
def test_every_row_arrives(archive, chunk, before):
    data, expected, _, root = archive
    with PromptDB.in_memory(chunk_tokens=chunk) as db:
        if before != "empty":
            with Engine(db, shared_model("gemma2"), shared_tokenizer()) as engine:
                if before == "rows":
                    Recorder(engine, N.POST_MLP, layers=1, positions=[2, 30]).run([IDS[:41]])
                else:
                    engine.put(IDS[:41] if before == "tokens" else [*IDS[:27], 9])
        report = import_archive(db, io.BytesIO(data))
        assert report.is_complete
        assert report.activations_dropped == 0
        assert report.activations_stored >= report.num_activations - 2
        for prompt, tensors in zip(PROMPTS, expected, strict=True):
            for (point, layer), rows in tensors.items():
                assert torch.allclose(read(db, root, prompt, point, layer), rows, atol=1e-5), (point, layer)
        assert read(db, root, IDS, N.POST_ACT, 0, positions=[3, 17, -1]).shape == (3, 128)
        assert db.verify() == []
        again = import_archive(db, io.BytesIO(data))
        assert (again.activations_stored, again.spans_stored, again.bytes_stored) == (0, 0, 0)


def test_versions_filters_and_namespaces(archive):
    data, expected, report, root = archive
    assert struct.unpack_from("<I", data, 12) == (2,)
    with pytest.raises(FormatVersionError, match="reads up to 1"):
        FrameReader(io.BytesIO(data), newest=1)  # what an older program says
    with PromptDB.in_memory() as db:
        found = import_archive(db, io.BytesIO(data), ImportOptions(with_activations=False))
        assert found.num_activations == report.num_activations
        assert found.activations_stored == 0
        assert db.recorded() == []
        stream = io.BytesIO()
        export_nodes(db, Selection(), stream)
        assert struct.unpack_from("<I", stream.getvalue(), 12) == (1,)
        moved = import_archive(db, io.BytesIO(data), ImportOptions(namespace="alice"))
        assert moved.activations_stored == moved.num_activations
        rows = db.activations(IDS, N.POST_MLP, 1, model=root.weights_id, tokenizer=root.tokenizer_id, namespace="alice")
        assert torch.equal(rows, expected[0][N.POST_MLP, 1])
        with pytest.raises(NotRecordedError):
            read(db, root, IDS, N.POST_MLP, 1)
        stream = io.BytesIO()
        assert export_nodes(db, Selection(with_activations=False), stream).num_activations == 0
        assert struct.unpack_from("<I", stream.getvalue(), 12) == (1,)
        none = import_archive(db, io.BytesIO(data), ImportOptions(wants_model=lambda identity: False))
        assert none.spans_filtered == none.num_spans
        assert none.activations_stored == 0
    assert check_archive(io.BytesIO(data)).num_activations == report.num_activations


def frames_of(data):
    reader = FrameReader(io.BytesIO(data))
    limits = {**dict.fromkeys(LIMITS, 1 << 30), b"BLOB": 1 << 30, RECORDED: 1 << 30}
    while True:
        kind, body, _ = reader.read(limits)
        yield kind, bytes(body)
        if kind == DONE:
            return


def changed(data, change, version=2):
    """Write an archive again, with the body of its recorded activations changed, and right checksums."""
    from promptdb.format import pack_record, unpack_record

    stream = io.BytesIO()
    writer = FrameWriter(stream, version)
    for kind, body in frames_of(data):
        if kind == DONE:
            fields = {**unpack_record(DONE_KEY, memoryview(body)), "digest": writer.digest()}
            body = pack_record(DONE_KEY, fields)
        for each in change(body) if kind == RECORDED else [body]:
            writer.write(kind, each)
    return stream.getvalue()


def named(name, blob):
    return struct.pack("<H", len(name)) + name + blob


def name_of(point, layer=None, dtype="F32"):
    return Series(point, layer, dtype).key(b"")


def rows_blob(values, shape=None, extra=()):
    data = struct.pack(f"<{len(values)}f", *values)
    return build_blob([(TensorSpec("rows", "F32", shape or (1, len(values))), data), *extra])


GOOD = rows_blob([1.0, 2.0])
U32 = TensorSpec("offsets", "U32", (1,))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda body: [body, body], "twice"),
        (lambda body: [body[:1]], "out of order"),
        (lambda body: [named(b"x" * 400, GOOD)], "key"),
        (lambda body: [named(name_of("no-such-point"), GOOD)], "nobody knows"),
        (lambda body: [named(name_of(N.POST_MLP), GOOD)], "layer"),
        (lambda body: [named(name_of(N.LOGITS, 3), GOOD)], "layer"),
        (lambda body: [named(name_of(N.LOGITS, None, "I64"), GOOD)], "I64"),
        (lambda body: [named(name_of(N.LOGITS, None, "F16"), GOOD)], "not those of the span"),
        (lambda body: [named(name_of(N.LOGITS), rows_blob([math.nan]))], "NaN or infinity"),
        (lambda body: [named(name_of(N.LOGITS), rows_blob([-math.inf]))], "NaN or infinity"),
        (lambda body: [named(name_of(N.LOGITS), rows_blob([0.0] * 40, (40, 1)))], "not those of the span"),
        (lambda body: [named(name_of(N.LOGITS), rows_blob([1.0], extra=[(U32, pack_tokens([99]))]))], "not those"),
        (
            lambda body: [named(name_of(N.LOGITS), rows_blob([1.0], extra=[(TensorSpec("x", "U8", (1,)), b"1")]))],
            "other tensors",
        ),
        (lambda body: [named(name_of(N.ATTN_PROBS, 0), GOOD)], "not those of the span"),
        (lambda body: [named(name_of(N.LOGITS), b"")], "blob"),
    ],
)
def test_what_cannot_be_is_refused(archive, change, reason):
    bad = changed(archive[0], change)
    with PromptDB.in_memory() as db:
        with pytest.raises(BrokenArchiveError, match=reason):
            import_archive(db, io.BytesIO(bad))
        assert db.verify() == []
    with pytest.raises(BrokenArchiveError):
        check_archive(io.BytesIO(bad))


def test_changed_totals_and_frames_of_a_later_version_are_refused(archive):
    data = archive[0]
    assert check_archive(io.BytesIO(changed(data, lambda body: [body]))).is_complete
    with pytest.raises(BrokenArchiveError, match="totals"):
        check_archive(io.BytesIO(changed(data, lambda body: [])))
    with pytest.raises(BrokenArchiveError, match="ACTV"):
        check_archive(io.BytesIO(changed(data, lambda body: [body], version=1)))
    with pytest.raises(BrokenArchiveError, match="ACTV frame of"):
        check_archive(io.BytesIO(data), ImportOptions(max_blob_bytes=9000))


def test_damaged_rows_are_left_out_and_counted(store_path):
    with PromptDB(store_path, chunk_tokens=16) as db, Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        Recorder(engine, N.POST_MLP).run([IDS])
        key = Series(N.POST_MLP, 0, "F32").key(engine.lookup(IDS).steps[1].node)

        def damage(writer):
            value = bytearray(writer.get(ACTIVATIONS, key))
            value[-3] ^= 1
            writer.put(ACTIVATIONS, key, value)

        db._index.transact(damage)
    with PromptDB(store_path) as db:
        stream = io.BytesIO()
        report = export_nodes(db, Selection(), stream)
        assert (report.num_activations, report.num_damaged_entries) == (7, 1)
        assert check_archive(io.BytesIO(stream.getvalue())).num_activations == 7


def test_the_commands(store_path, tmp_path):
    with PromptDB(store_path) as db, Engine(db, shared_model("llama"), shared_tokenizer()) as engine:
        Recorder(engine, N.POST_MLP).run([IDS])
    file, plain = tmp_path / "a.archive", tmp_path / "b.archive"
    assert "2 entries of recorded activations among them" in run("export", file, "--db", store_path).stdout
    assert run_json("export", plain, "--without-activations", "--db", store_path)["num_activations"] == 0
    assert "2 entries of recorded activations stored" in run("import", file, "--db", tmp_path / "one").stdout
    assert run_json("import", file, "--without-activations", "--db", tmp_path / "two")["activations_stored"] == 0
    assert run_json("import", plain, "--db", tmp_path / "three")["num_activations"] == 0
    listed = run_json("activations", "ls", "--db", tmp_path / "one")["activations"]
    assert [each["num_tokens"] for each in listed] == [60, 60]
